"""A catalogue over HTTP: Gorse's REST API, ours beside it, and one page"""
