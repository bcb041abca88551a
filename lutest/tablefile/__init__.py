"""What a table file is: its tables and macros, how it is written, opened for SQL, exported and verified."""
