"""Where this wing finds its training pictures; `limbeck.data.pictures` has them for every wing."""

from limbeck.data.pictures import Pictures

__all__ = ["Pictures"]
