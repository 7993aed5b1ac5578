package sqlite

// SetFault calls f between the steps of making and rolling segments.
func SetFault(c *JournalConfig, f func(step string)) { c.fault = f }
