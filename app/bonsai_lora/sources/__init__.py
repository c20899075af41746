"""Origins that the operator named, and the files of adapters that are pulled from them."""
