"""Split learning as public demos do it, measured beside `fedbert-ds bench pipeline`."""
