"""What a person looks at: pictures, pages, tables, the terminal."""
