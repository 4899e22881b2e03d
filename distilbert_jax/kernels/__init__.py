"""Arrays in, arrays out, in the form that each platform is fast at."""
