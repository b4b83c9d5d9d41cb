"""The same text trained in several ways, side by side: `fedbert-ds compare`."""
