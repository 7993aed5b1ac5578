package wire

// SetLog is the body of POST /admin/v1/log; what is left out stays.
type SetLog struct {
	Directory *string `json:"directory,omitempty"` // "": no files
	Level     string  `json:"level,omitempty"`     // error, warning, info, debug
	KeepDays  int     `json:"keep_days,omitempty"` // 180–36500
	Reason    string  `json:"reason"`
}

// ReadLog is the body of POST /admin/v1/log/lines.
type ReadLog struct {
	Lines int `json:"lines,omitempty"` // the last so many, 1–10000; 0: 100
}

// A LogStatus is where the running log goes.
type LogStatus struct {
	Directory string `json:"directory"`        // as it was set
	Folder    string `json:"folder,omitempty"` // where that is; "": standard error alone
	Level     string `json:"level"`
	KeepDays  int    `json:"keep_days"`
	Decided   string `json:"decided_by"` // "config.toml", or who set it since
	Files     int    `json:"files"`
	Bytes     int64  `json:"bytes"`
	Lost      uint64 `json:"lost_lines"` // since the start: these went to standard error alone
	Failed    string `json:"last_failure,omitempty"`
}
