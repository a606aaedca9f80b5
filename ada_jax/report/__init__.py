"""Tables, figures and a page out of results files."""
