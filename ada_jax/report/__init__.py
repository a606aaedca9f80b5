"""Tables, figures and a web page from results files. Does not import JAX."""
