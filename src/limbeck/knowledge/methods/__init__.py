"""One file a method. The file's name is the method's id, with `_` for `-`."""
