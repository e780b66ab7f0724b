"""The terminal UI: it reads run folders, and never touches a trainer."""
