"""The former plumbing. It stays until the last script has moved to the modules beside it; nothing new imports it."""
