"""Split learning as public demos do it, run beside `fedbert-ds bench pipeline`."""
