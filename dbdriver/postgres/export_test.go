package postgres

// Parse reads a DSN.
var Parse = parse
