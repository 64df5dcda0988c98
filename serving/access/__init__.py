"""Who is let in: keys and their scopes, certificates, limits."""
