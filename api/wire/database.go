package wire

// Compare is the body of POST /admin/v1/compare: the journal against the central database.
type Compare struct{}

// Rebuild is the body of POST /admin/v1/rebuild: the central database is made anew from journals.
type Rebuild struct {
	// Replace are the nodes whose rows are in the database and go, because a journal makes them anew.
	Replace []string `json:"replace,omitempty"`
	// Remove are nodes without a journal whose rows go.
	Remove []string `json:"remove,omitempty"`
	// Journals are folders of copies of other appliances, with journal/ and log.pem in them, on the appliance's machine.
	Journals []string `json:"journals,omitempty"`
	// Discard has rows of replaced nodes go, too, that their journal has no entries for.
	Discard bool   `json:"discard,omitempty"`
	Reason  string `json:"reason"` // 1–256 bytes
}

// Archive is the body of POST /admin/v1/archive: this appliance's rows of closed months are moved to the archive.
type Archive struct {
	Before string `json:"before"`            // the first month that stays, in [MonthLayout], of Beijing time
	DryRun bool   `json:"dry_run,omitempty"` // only counts
	Reason string `json:"reason,omitempty"`  // 1–256 bytes; may be left out of a dry run
}

// MonthLayout is how a month is written.
const MonthLayout = "2006-01"

// YearReport is the body of POST /admin/v1/reports/year.
type YearReport struct {
	Year int `json:"year"` // of Beijing time
}
