"""Where captioned or labelled images come from: folders, tables, tars, hub data sets, classes."""
