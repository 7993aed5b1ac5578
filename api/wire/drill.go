package wire

// What a drill can break.
const (
	DrillHSM    = "hsm"
	DrillDB     = "db"
	DrillTime   = "time"
	DrillCampus = "campus"
	DrillCA     = "ca"
)

// DrillParts are all of them.
func DrillParts() []string { return []string{DrillHSM, DrillDB, DrillTime, DrillCampus, DrillCA} }

// How long a drill may break something, in seconds.
const (
	DrillLeast = 5
	DrillMost  = 300
)

// BeginDrill is the body of POST /admin/v1/drills: consent to one break, and a test application and a test account for it. The
// answer is a [BegunDrill].
type BeginDrill struct {
	Part    string   `json:"part"`
	Seconds int      `json:"seconds"`           // how long it will be broken: 5–300
	Machine string   `json:"machine,omitempty"` // hsm: which one; left out: the first
	Reason  string   `json:"reason"`
	Persons []string `json:"persons,omitempty"` // two, where the appliance is not for evaluation

	Evaluation bool `json:"-"` // said by the server
}

// ConfirmedBy is as [SetCustodians.ConfirmedBy].
func (r *BeginDrill) ConfirmedBy() *[]string { return &r.Persons }

// Alone says that one person may do it.
func (r *BeginDrill) Alone() bool { return r.Evaluation }

// BegunDrill is its answer.
type BegunDrill struct {
	ID  string `json:"id"`  // of the drill, its application and its signer
	Key []byte `json:"key"` // the application's HMAC key
	// Anchor is the certificate of the drill's own CA, DER; of a drill "ca" alone.
	Anchor []byte `json:"anchor,omitempty"`
}

// BreakDrill is the body of POST /admin/v1/drills/{id}/break. The break ends by itself, after the seconds that were consented to.
type BreakDrill struct {
	ID string `json:"-"`
	// Revoke has the drill's CA revoke the signer's certificate, once its list is whole again; of a drill "ca" alone.
	Revoke bool `json:"revoke,omitempty"`
}

// EndDrill is the body of POST /admin/v1/drills/{id}/end. The answer is an [EndedDrill].
type EndDrill struct {
	ID string `json:"-"`
	// Abandon: nobody waits for its rows.
	Abandon bool `json:"abandon,omitempty"`
}

// EndedDrill is its answer.
type EndedDrill struct {
	// Rows are the drill's records as the central database has them; of a drill "db" or "campus".
	Rows []DrillRow `json:"rows,omitempty"`
}

// A DrillRow is a row of the central database.
type DrillRow struct {
	RecordID string `json:"record_id"` // 64 hexadecimal digits
	Leaf     string `json:"leaf"`      // likewise
}

// A DrillState is a drill that is under way.
type DrillState struct {
	ID      string   `json:"id"`
	Part    string   `json:"part"`
	Machine string   `json:"machine,omitempty"`
	By      string   `json:"by,omitempty"` // for administrators alone, as what follows it
	Persons []string `json:"persons,omitempty"`
	Reason  string   `json:"reason,omitempty"`
	Broken  bool     `json:"broken"`
	LeftS   int      `json:"left_s"` // until what is broken is whole again, or the drill is over by itself
	// Explains are the codes of alarms that it brings about.
	Explains []string `json:"explains,omitempty"`
}

// DrillStatus is the answer of GET /admin/v1/drills; nil: there is none.
type DrillStatus struct {
	Drill *DrillState `json:"drill"`
}
