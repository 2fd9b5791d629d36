"""The demo page: checking a request (request), drawing with live previews (live), and the page
itself (page). Only the page needs Gradio.
"""
