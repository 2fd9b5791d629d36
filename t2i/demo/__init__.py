"""The demo page: what may be asked for (request), drawing that can be watched (live), and the page
itself (page), which alone needs Gradio.
"""
