"""From an event on the bus to rows of the database, each event once, and what is read of them."""
