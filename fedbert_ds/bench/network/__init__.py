"""`fedbert-ds bench network`: what a rank's endpoint accepts, and what that costs."""
