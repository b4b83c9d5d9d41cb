"""`fedbert-ds bench pipeline`: how busy clients behind slow links keep the body."""
