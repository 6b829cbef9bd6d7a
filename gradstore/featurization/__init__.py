"""The one bridge from models to stores."""
