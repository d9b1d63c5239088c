"""The server's side: its home, the one port, tickets and uploads, and the process that starts it all."""
