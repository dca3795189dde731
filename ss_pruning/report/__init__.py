"""What a run did: records, as a table, as JSON and as one HTML page.

`records` holds the report, `notes` says how each number was come by, `formatting` turns numbers into text; `html`
fills the templates in `templates/` with the figures of `charts` and `violin`. `comparison` is of two reports.
"""
