package wire

// RunPreserve is the body of POST /admin/v1/preserve/run: archive and renew what is due, and all that is not archived yet.
type RunPreserve struct{}

// PreservedRecord is the body of POST /admin/v1/preserve/record. The answer is the record's evidence file.
type PreservedRecord struct {
	ID string `json:"id"` // record id, 64 hexadecimal digits
}
