package uselog

// SetFileUses makes files small.
func SetFileUses(n uint64) { fileUses = n }
