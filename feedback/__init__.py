"""The stream of what users say, from acknowledged to stored."""
