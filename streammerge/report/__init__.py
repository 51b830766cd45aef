"""What models differ in and what a merge made of them: numbers, tables, and a page to look at."""
