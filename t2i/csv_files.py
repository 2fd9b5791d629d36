"""Reads CSV files, with messages for what spreadsheets and editors make of them."""

import csv
import io
from typing import Any

from t2i.errors import UserError, refuse_utf16


def read_csv(content: bytes, what: str, **form: Any) -> tuple[list[str], list[tuple[int, dict]]]:
    """The column names of a CSV file, and its rows, each with the number of its last line. A row
    with more cells than the header has the others under None; missing cells are None.

    form: options of `csv.reader`. Without strict=True, a quote that is never closed takes the rest
    of the file for its cell's text.

    Raises:
        UserError: it is not UTF-8, or not CSV.
    """
    refuse_utf16(content, what)
    try:
        text = io.StringIO(content.decode("utf-8-sig"), newline="")
        reader = csv.DictReader(text, **form)
        rows = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not a CSV in UTF-8: {error}") from error
    except csv.Error as error:
        raise UserError(
            f"{what} is not a CSV: {error} (row that ends on line {reader.line_num}); a cell that "
            'begins with a quote must end with one, and quotes in it are doubled: ""'
        ) from error
    return [*(reader.fieldnames or ())], rows


def too_many_cells(line: int) -> str:
    """What is wrong with a row that has a cell under None."""
    return f"line {line} has more cells than the header: put texts with commas in quotes"
