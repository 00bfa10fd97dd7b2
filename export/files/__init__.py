"""Files and folders: those of others read within bounds, one's own written whole or taken up again."""
