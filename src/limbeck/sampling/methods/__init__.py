"""One file is one published method; `limbeck methods --wing sampling` lists them."""
