// Package check is the acceptance of a database at a site: what the program needs of it, tried on the very server and
// with the very driver. What it makes it drops again; tables in use it does not touch. The same checks run in our
// tests on SQLite, PostgreSQL and the driver that behaves as DM8's was read to.
package check

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
	"yinjian/dbdriver/central"
)

// A Result is what came of one check.
type Result string

// Results.
const (
	Passed   Result = "passed"
	Failed   Result = "failed"
	Observed Result = "observed"    // a fact about the database that is no fault, good to know
	Skipped  Result = "not checked" // and Detail says why
)

// An Item is one check.
type Item struct {
	Name   string `json:"name"`
	What   string `json:"what"` // Chinese and English
	Result Result `json:"result"`
	Detail string `json:"detail,omitempty"`
}

// A Report is what a site hands in. Its JSON is what is signed.
type Report struct {
	Format    string            `json:"format"` // "yinjian/db-check/v1"
	Program   string            `json:"program"`
	Database  string            `json:"database"` // the seam's name
	DSN       string            `json:"dsn"`      // without a password
	At        string            `json:"at"`       // RFC 3339; the program's clock, not proved
	Drivers   []string          `json:"drivers"`  // that the program has, and the modules that bring them
	Modules   []string          `json:"modules"`
	Settings  []central.Setting `json:"settings"`
	Items     []Item            `json:"items"`
	CommitsMS []float64         `json:"commits_ms,omitempty"` // time of single commits: median, 95th percentile, worst
	Soak      *Soak             `json:"soak,omitempty"`
}

// A Soak is what came of writing row after row for some time, in which the site may switch servers.
type Soak struct {
	Seconds      float64          `json:"seconds"`
	Rows         int64            `json:"rows"`           // acknowledged, or found after the answer was lost
	AnswersLost  int64            `json:"answers_lost"`   // rows that were found so
	Errors       map[string]int64 `json:"errors"`         // by what they mean
	LongestGapMS float64          `json:"longest_gap_ms"` // between two rows
}

// OK says that nothing failed and no setting is refused.
func (r *Report) OK() bool {
	return !slices.ContainsFunc(r.Items, func(i Item) bool { return i.Result == Failed }) &&
		!slices.ContainsFunc(r.Settings, func(s central.Setting) bool { return s.Verdict == central.Unfit })
}

// A run is one pass.
type run struct {
	ctx    context.Context
	db     *sql.DB
	seam   *central.Seam
	by     string
	report *Report
}

// callLimit bounds each call; a database that does not answer within it has failed.
const callLimit = 20 * time.Second

// Run checks, and writes for as long as soak says. The error is for a database that cannot be reached or whose leftovers cannot be removed; everything else
// stands in the report.
func Run(ctx context.Context, db *sql.DB, seam *central.Seam, soak time.Duration, report *Report) error {
	r := &run{ctx: ctx, db: db, seam: seam, by: "db-check", report: report}
	report.Format, report.Database, report.Drivers = "yinjian/db-check/v1", seam.Name, sql.Drivers()
	if err := db.PingContext(ctx); err != nil {
		return seam.Error(err)
	}
	if seam.Settings != nil {
		settings, err := seam.Settings(ctx, db)
		if err != nil {
			return seam.Error(err)
		}
		report.Settings = settings
		if slices.ContainsFunc(settings, func(s central.Setting) bool { return s.Verdict == central.Unfit }) {
			return nil // whatever else were tried would not be what the program does there
		}
	}
	if err := r.drop(central.ProbeTable, central.ProbeDrop); err != nil { // of a check that was cut off
		return err
	}
	defer func() {
		r.ctx = context.WithoutCancel(ctx)
		r.item("left", "所建的表已删除 (what was made is dropped)", func(context.Context) error { return r.drop(central.ProbeTable, central.ProbeDrop) })
	}()
	if !r.item("create", "建表、建唯一索引 (a table and a unique index)", r.create) {
		return nil
	}
	r.item("names", "大小写：以小写书写的表名、索引名可查到 (names written in lower case are found)", r.names)
	r.item("round-trip", "写入、提交、读回 (written, committed, read)", func(ctx context.Context) error {
		if err := r.insert(ctx, r.db, 1, "x", nil); err != nil {
			return err
		}
		got, err := r.text(ctx, 1)
		return same(got, "x", err)
	})
	r.item("text", "汉字、四字节字、引号、反斜线、首尾空格逐字节读回 (text comes back byte by byte)", r.texts)
	r.item("bytes-of-text", "VARCHAR(256) 容得下 256 字节的汉字 (256 bytes of Chinese fit)", func(ctx context.Context) error {
		want := strings.Repeat("汉", 85) + "z"
		if err := r.insert(ctx, r.db, 80, want, nil); err != nil {
			return err
		}
		got, err := r.text(ctx, 80)
		return same(got, want, err)
	})
	r.item("absent", "缺省值为 NULL (absent text is NULL)", func(ctx context.Context) error {
		if err := r.insert(ctx, r.db, 81, nil, nil); err != nil {
			return err
		}
		got, err := r.text(ctx, 81)
		if err == nil && got.Valid {
			err = fmt.Errorf("%q", got.String)
		}
		return err
	})
	r.observe("empty", "空串存入后读作 (what an empty text comes back as)", func(ctx context.Context) (string, error) {
		if err := r.insert(ctx, r.db, 82, "", nil); err != nil {
			return "", err
		}
		got, err := r.text(ctx, 82)
		if !got.Valid {
			return "NULL", err
		}
		return fmt.Sprintf("%q", got.String), err
	})
	r.observe("trailing-space", "唯一键中 'a' 与 'a ' (in a unique key)", func(ctx context.Context) (string, error) { return r.twins(ctx, 84, "pad", "pad ") })
	r.observe("case", "唯一键中 'a' 与 'A' (in a unique key)", func(ctx context.Context) (string, error) { return r.twins(ctx, 86, "case", "CASE") })
	r.item("numbers", "BIGINT 的最小值与最大值 (the ends of BIGINT)", r.numbers)
	r.item("bytes", "100 KB 字节串，含零字节 (100 KB of bytes, zeros too)", r.bytes)
	r.item("unique", "重复键被拒，认得出，事务随之结束 (a duplicate is refused, known as such, and ends its transaction)", r.unique)
	r.item("rollback", "回滚后无痕 (a rollback leaves nothing)", r.rollback)
	r.observe("ddl", "事务中建的索引与之前的写入，回滚之后 (what DDL within a transaction does to it)", r.ddl)
	r.item("limit", "绑定的 LIMIT 与次序 (a bound LIMIT, and order)", r.limit)
	r.item("rows", "一条语句写 64 行 (64 rows of one statement)", r.rows)
	r.item("conditional", "带条件的 UPDATE 报告行数 (a conditional UPDATE says how many rows it found)", r.conditional)
	r.item("committed-only", "未提交的写入别人看不见 (what is not committed is not seen)", r.committedOnly)
	r.item("deadline", "等锁到时限即放弃，连接池照常 (who waits for a lock gives up in time, and the pool goes on)", r.deadline)
	r.item("deadlock", "死锁有一方得到可识别的错误 (of a deadlock one side is told so)", r.deadlock)
	r.item("writers", "四个连接同时写 (four connections write at once)", r.writers)
	r.item("commits", "单次提交的时间 (time of single commits)", r.commits)
	r.store()
	if soak > 0 {
		r.soak(soak)
	}
	return nil
}

// item runs one check that passes or fails.
func (r *run) item(name, what string, f func(context.Context) error) bool {
	ctx, cancel := context.WithTimeout(r.ctx, callLimit)
	defer cancel()
	i := Item{Name: name, What: what, Result: Passed}
	var skip skipped
	switch err := f(ctx); {
	case errors.As(err, &skip):
		i.Result, i.Detail = Skipped, string(skip)
	case err != nil:
		i.Result, i.Detail = Failed, r.seam.Error(err).Error()
	}
	r.report.Items = append(r.report.Items, i)
	return i.Result == Passed
}

// observe notes a fact.
func (r *run) observe(name, what string, f func(context.Context) (string, error)) {
	var fact string
	if r.item(name, what, func(ctx context.Context) (err error) { fact, err = f(ctx); return err }) {
		last := &r.report.Items[len(r.report.Items)-1]
		last.Result, last.Detail = Observed, fact
	}
}

// skipped says why a check has no meaning here.
type skipped string

func (s skipped) Error() string { return string(s) }

func same(got sql.NullString, want string, err error) error {
	if err == nil && got.String != want {
		err = fmt.Errorf("%q 读作 (came back as) %q", want, got.String)
	}
	return err
}

// An execer is a *sql.DB or a *sql.Tx.
type execer interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
}

func (r *run) drop(table string, s central.Statement) error {
	there, err := r.seam.Exists(r.ctx, r.db, "table", table)
	if err == nil && there {
		_, err = r.db.ExecContext(r.ctx, r.seam.Text(s.Text))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", table, r.seam.Error(err))
	}
	return nil
}

func (r *run) create(ctx context.Context) error {
	for _, s := range []central.Statement{central.ProbeCreate, central.ProbeUnique} {
		if _, err := r.db.ExecContext(ctx, r.seam.Text(s.Text)); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) names(ctx context.Context) error {
	for kind, name := range map[string]string{"table": central.ProbeTable, "index": central.ProbeIndex} {
		there, err := r.seam.Exists(ctx, r.db, kind, name)
		if err != nil || !there {
			return errors.Join(err, fmt.Errorf("%s %s: 查不到 (is not found)", kind, name))
		}
		if there, err = r.seam.Exists(ctx, r.db, kind, name+"_not"); err != nil || there {
			return errors.Join(err, fmt.Errorf("%s %s_not: 查到了 (is found)", kind, name))
		}
	}
	return nil
}

// insert writes one row; with a *sql.DB in a transaction of its own.
func (r *run) insert(ctx context.Context, e execer, no int64, text, data any) error {
	db, whole := e.(*sql.DB)
	if !whole {
		_, err := e.ExecContext(ctx, r.seam.Text(central.ProbeInsert.Text), no, text, data, r.by, int64(0), r.by, int64(0))
		return err
	}
	return r.tx(ctx, db, func(tx *sql.Tx) error { return r.insert(ctx, tx, no, text, data) })
}

func (r *run) tx(ctx context.Context, db *sql.DB, f func(*sql.Tx) error) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err := f(tx); err != nil {
		tx.Rollback() // the cause is err
		return err
	}
	return tx.Commit()
}

func (r *run) text(ctx context.Context, no int64) (s sql.NullString, err error) {
	err = r.db.QueryRowContext(ctx, r.seam.Text(central.ProbeText.Text), no).Scan(&s)
	return s, err
}

func (r *run) count(ctx context.Context, from, to int64) (n int64, err error) {
	err = r.db.QueryRowContext(ctx, r.seam.Text(central.ProbeCount.Text), from, to).Scan(&n)
	return n, err
}

var odd = []string{
	"王小明", "𠮷野家 🩺", "㐀𪚥", "trailing  ", "  leading", " ", "it's \"quoted\" \\ back%_", "line\nbreak\ttab", "; DROP TABLE yj_probe --", "NULL", "?", "$1", ":1",
}

func (r *run) texts(ctx context.Context) error {
	for i, want := range odd {
		no := int64(10 + i)
		if err := r.insert(ctx, r.db, no, want, nil); err != nil {
			return fmt.Errorf("%q: %w", want, err)
		}
		got, err := r.text(ctx, no)
		if err := same(got, want, err); err != nil {
			return err
		}
		var n int64
		if err := r.db.QueryRowContext(ctx, r.seam.Text(central.ProbeFind.Text), want).Scan(&n); err != nil || n != 1 {
			return errors.Join(err, fmt.Errorf("%q 查到 (is found) %d 次 (times)", want, n))
		}
	}
	return nil
}

// twins says whether two texts are one key.
func (r *run) twins(ctx context.Context, no int64, a, b string) (string, error) {
	if err := r.insert(ctx, r.db, no, a, nil); err != nil {
		return "", err
	}
	err := r.insert(ctx, r.db, no+1, b, nil)
	switch {
	case err == nil:
		return "不同 (two keys)", nil
	case errors.Is(r.seam.Error(err), dbdriver.ErrConflict):
		return "相同 (one key)", nil
	}
	return "", err
}

func (r *run) numbers(ctx context.Context) error {
	const least, most = int64(-1 << 63), int64(1<<63 - 1)
	err := r.tx(ctx, r.db, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, r.seam.Text(central.ProbeInsert.Text), int64(90), nil, nil, r.by, least, r.by, most)
		return err
	})
	if err != nil {
		return err
	}
	var a, b int64
	if err := r.db.QueryRowContext(ctx, r.seam.Text(central.ProbeTimes.Text), int64(90)).Scan(&a, &b); err != nil {
		return err
	}
	if a != least || b != most {
		return fmt.Errorf("%d, %d", a, b)
	}
	return nil
}

func (r *run) bytes(ctx context.Context) error {
	for no, size := range map[int64]int{91: 1, 92: 5000, 93: 100_000} {
		want := make([]byte, size)
		for i := range want {
			want[i] = byte(i * 7)
		}
		if err := r.insert(ctx, r.db, no, nil, want); err != nil {
			return fmt.Errorf("%d 字节 (bytes): %w", size, err)
		}
		var got []byte
		into := any(&got)
		if r.seam.ScanBytes != nil {
			into = r.seam.ScanBytes(&got)
		}
		if err := r.db.QueryRowContext(ctx, r.seam.Text(central.ProbeData.Text), no).Scan(into); err != nil {
			return fmt.Errorf("%d 字节 (bytes): %w", size, err)
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("%d 字节读作另外 %d 字节 (came back as other %d)", size, len(got), len(got))
		}
	}
	return nil
}

func (r *run) unique(ctx context.Context) error {
	err := r.tx(ctx, r.db, func(tx *sql.Tx) error {
		if err := r.insert(ctx, tx, 94, nil, nil); err != nil {
			return fmt.Errorf("第一行 (the first row): %v", err)
		}
		return r.insert(ctx, tx, 1, nil, nil)
	})
	if !errors.Is(r.seam.Error(err), dbdriver.ErrConflict) {
		return fmt.Errorf("得到 (got) %v", err)
	}
	n, err := r.count(ctx, 94, 94)
	if err == nil && n != 0 {
		err = errors.New("回滚后仍有同一事务的另一行 (another row of the transaction stayed)")
	}
	return err
}

func (r *run) rollback(ctx context.Context) error {
	tx, err := r.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	err = r.insert(ctx, tx, 95, nil, nil)
	if err := errors.Join(err, tx.Rollback()); err != nil {
		return err
	}
	n, err := r.count(ctx, 95, 95)
	if err == nil && n != 0 {
		err = errors.New("仍在 (is still there)")
	}
	return err
}

// ddl makes a row and an index within a transaction that is rolled back.
func (r *run) ddl(ctx context.Context) (string, error) {
	tx, err := r.db.BeginTx(ctx, nil)
	if err != nil {
		return "", err
	}
	err = r.insert(ctx, tx, 96, nil, nil)
	if err == nil {
		_, err = tx.ExecContext(ctx, r.seam.Text(central.ProbeSecond.Text))
	}
	tx.Rollback() // an error here is what is observed
	if err != nil {
		return "", err
	}
	n, err := r.count(ctx, 96, 96)
	if err != nil {
		return "", err
	}
	there, err := r.seam.Exists(ctx, r.db, "index", central.ProbeSecondIndex)
	return fmt.Sprintf("写入提交了 (the row was committed): %v；索引建成了 (the index was made): %v", n == 1, there), err
}

func (r *run) limit(ctx context.Context) error {
	err := r.tx(ctx, r.db, func(tx *sql.Tx) error {
		for _, no := range []int64{204, 202, 200, 201, 203} {
			if err := r.insert(ctx, tx, no, nil, nil); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	rows, err := r.db.QueryContext(ctx, r.seam.Text(central.ProbePage.Text), int64(201), int64(299), int64(3))
	if err != nil {
		return err
	}
	defer rows.Close()
	var got []int64
	for rows.Next() {
		var no int64
		if err := rows.Scan(&no); err != nil {
			return err
		}
		got = append(got, no)
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if !slices.Equal(got, []int64{201, 202, 203}) {
		return fmt.Errorf("%v", got)
	}
	return nil
}

func (r *run) rows(ctx context.Context) error {
	const n = 64
	err := r.tx(ctx, r.db, func(tx *sql.Tx) error {
		var args []any
		for i := range int64(n) {
			args = append(args, 300+i, nil, nil, r.by, int64(0), r.by, int64(0))
		}
		res, err := tx.ExecContext(ctx, r.seam.Text(central.SeveralRows(central.ProbeInsert.Text, n)), args...)
		if err != nil {
			return err
		}
		if wrote, err := res.RowsAffected(); err != nil || wrote != n {
			return errors.Join(err, fmt.Errorf("RowsAffected = %d", wrote))
		}
		return nil
	})
	if err != nil {
		return err
	}
	got, err := r.count(ctx, 300, 300+n-1)
	if err == nil && got != n {
		err = fmt.Errorf("%d 行 (rows)", got)
	}
	return err
}

// change is a compare-and-set of modified_at.
func (r *run) change(ctx context.Context, e execer, no, from, to int64) (int64, error) {
	res, err := e.ExecContext(ctx, r.seam.Text(central.ProbeChange.Text), r.by, to, no, from)
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

func (r *run) conditional(ctx context.Context) error {
	return r.tx(ctx, r.db, func(tx *sql.Tx) error {
		for _, c := range []struct{ from, to, want int64 }{{0, 1, 1}, {0, 2, 0}, {1, 1, 1}, {1, 0, 1}} {
			if n, err := r.change(ctx, tx, 200, c.from, c.to); err != nil || n != c.want {
				return errors.Join(err, fmt.Errorf("%d → %d: %d 行，应为 %d (rows)", c.from, c.to, n, c.want))
			}
		}
		return nil
	})
}

func (r *run) committedOnly(ctx context.Context) error {
	tx, err := r.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // does nothing after the one below
	if err := r.insert(ctx, tx, 97, nil, nil); err != nil {
		return err
	}
	n, err := r.count(ctx, 97, 97)
	if err == nil && n != 0 {
		err = errors.New("别的连接看见了 (another connection saw it)")
	}
	return errors.Join(err, tx.Rollback())
}

// lockWait is how long the one who waits for a lock may do so.
const lockWait = time.Second

func (r *run) deadline(ctx context.Context) error {
	holder, err := r.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer holder.Rollback() // does nothing after the one below
	if _, err := r.change(ctx, holder, 201, 0, 1); err != nil {
		return err
	}
	short, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	begun := time.Now() // interval
	err = r.tx(short, r.db, func(tx *sql.Tx) error { _, err := r.change(short, tx, 201, 0, 2); return err })
	took := time.Since(begun)
	if err == nil {
		return errors.New("没有等锁 (did not wait for the lock)")
	}
	if took > callLimit*3/4 {
		return fmt.Errorf("时限 %v，过了 %v 才放弃 (gave up only after that)", lockWait, took.Round(time.Millisecond))
	}
	if err := holder.Rollback(); err != nil {
		return err
	}
	if _, err := r.count(ctx, 0, 1); err != nil {
		return fmt.Errorf("此后 (afterwards): %w", err)
	}
	return nil
}

func (r *run) deadlock(ctx context.Context) error {
	if r.seam.Name == "sqlite" {
		return skipped("SQLite 同时只有一个写者 (SQLite has one writer at a time)")
	}
	begin := func(first int64) (*sql.Tx, error) {
		short, cancel := context.WithTimeout(ctx, lockWait)
		defer cancel()
		tx, err := r.db.BeginTx(ctx, nil)
		if err == nil {
			if _, err = r.change(short, tx, first, 0, 1); err != nil {
				tx.Rollback() // the cause is err
			}
		}
		return tx, err
	}
	a, err := begin(202)
	if err != nil {
		return err
	}
	defer a.Rollback()
	b, err := begin(203)
	if err != nil {
		return skipped(fmt.Sprintf("两个事务不能同时写：%v (two transactions cannot write at once)", err))
	}
	defer b.Rollback()
	answers := make(chan error, 2)
	go func() { _, err := r.change(ctx, a, 203, 0, 1); answers <- err }()
	go func() { _, err := r.change(ctx, b, 202, 0, 1); answers <- err }()
	first := <-answers
	// The other may go on once the first has ended its transaction.
	a.Rollback()
	b.Rollback()
	second := <-answers
	if !errors.Is(r.seam.Error(first), dbdriver.ErrDeadlock) && !errors.Is(r.seam.Error(second), dbdriver.ErrDeadlock) {
		return fmt.Errorf("得到 (got) %v; %v", first, second)
	}
	return nil
}

func (r *run) writers(ctx context.Context) error {
	const writers, each = 4, 25
	errs := make([]error, writers)
	var wg sync.WaitGroup
	for w := range int64(writers) {
		wg.Go(func() {
			for i := range int64(each) {
				if err := r.insert(ctx, r.db, 1000+w*each+i, nil, nil); err != nil {
					errs[w] = err
					return
				}
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	n, err := r.count(ctx, 1000, 1000+writers*each-1)
	if err == nil && n != writers*each {
		err = fmt.Errorf("%d 行 (rows)", n)
	}
	return err
}

func (r *run) commits(ctx context.Context) error {
	const n = 40
	var took []float64
	for i := range int64(n) {
		begun := time.Now() // interval
		if err := r.insert(ctx, r.db, 2000+i, nil, nil); err != nil {
			return err
		}
		took = append(took, float64(time.Since(begun).Microseconds())/1000)
	}
	slices.Sort(took)
	r.report.CommitsMS = []float64{took[n/2], took[n*95/100], took[n-1]}
	return nil
}

const (
	soakFrom  = 1_000_000 // number of the first row
	soakPause = 10 * time.Millisecond
	soakCall  = 5 * time.Second
)

// soak writes row after row. After an error the row is looked for before it is written again, as the shipper does. In
// the end each row is there once.
func (r *run) soak(d time.Duration) {
	s := &Soak{Errors: map[string]int64{}}
	r.report.Soak = s
	begun := time.Now() // interval
	last := begun
	done := func() {
		s.LongestGapMS = max(s.LongestGapMS, float64(time.Since(last).Microseconds())/1000)
		last = time.Now() // interval
		s.Rows++
	}
	note := func(err error) { s.Errors[kind(r.seam.Error(err))]++ }
	unsure := false
	// A row that is open when the time is over may take a while longer.
	for over := false; !over && r.ctx.Err() == nil; {
		if !unsure && time.Since(begun) > d || time.Since(begun) > d+time.Minute {
			over = true
			continue
		}
		no := soakFrom + s.Rows
		ctx, cancel := context.WithTimeout(r.ctx, soakCall)
		if unsure {
			n, err := r.count(ctx, no, no)
			switch {
			case err != nil:
				note(err)
			case n > 0:
				unsure = false
				s.AnswersLost++
				done()
			default:
				unsure = false
			}
		} else if err := r.insert(ctx, r.db, no, nil, nil); err != nil {
			note(err)
			unsure = true
		} else {
			done()
		}
		cancel()
		select {
		case <-r.ctx.Done():
		case <-time.After(soakPause):
		}
	}
	s.Seconds = time.Since(begun).Round(time.Millisecond).Seconds()
	r.item("soak", "持续写入：每一行恰好一次，故障后续写 (row after row, each once, over every fault)", func(ctx context.Context) error {
		if unsure {
			return errors.New("一分钟后库仍不可用 (the database did not come back within a minute)")
		}
		n, err := r.count(ctx, soakFrom, soakFrom+s.Rows)
		if err == nil && n != s.Rows {
			err = fmt.Errorf("%d 行，库中 %d 行 (rows, in the database)", s.Rows, n)
		}
		if err == nil && s.Rows == 0 {
			err = errors.New("一行也没有写成 (no row was written)")
		}
		return err
	})
}

// kind is an error in a word.
func kind(err error) string {
	for _, k := range []struct {
		err  error
		word string
	}{
		{dbdriver.ErrConflict, "conflict"}, {dbdriver.ErrReadOnly, "read-only"}, {dbdriver.ErrDeadlock, "deadlock"}, {dbdriver.ErrFull, "full"},
		{context.DeadlineExceeded, "deadline"}, {dbdriver.ErrUnfit, "unfit"},
	} {
		if errors.Is(err, k.err) {
			return k.word
		}
	}
	return "unavailable"
}

// store runs the program's own tables through their life, where there are none yet.
func (r *run) store() {
	const what = "本程序的表：迁移两遍、写入、重写、分叉被拒、移入归档、逐行读回 (the program's tables: migrated twice, written, repeated, a fork refused, moved to the archive, read)"
	made := false
	r.item("store", what, func(ctx context.Context) error {
		for _, table := range tables {
			if there, err := r.seam.Exists(ctx, r.db, "table", table.name); err != nil || there {
				return errors.Join(err, skipped("库中已有 "+table.name+"：不在使用中的库上试写 (tables are in use)"))
			}
		}
		made = true
		by := central.Author{Name: r.by}
		if err := central.Migrate(ctx, r.db, r.seam, by); err != nil {
			return err
		}
		s, err := central.Open(ctx, r.db, r.seam, by) // not closed: the pool is the caller's
		if err != nil {
			return err
		}
		return tryStore(ctx, s)
	})
	if made {
		for _, t := range tables {
			r.item("store-left", t.name+" 已删除 (is dropped)", func(context.Context) error { return r.drop(t.name, t.drop) })
		}
	}
}

var tables = []struct {
	name string
	drop central.Statement
}{
	{"yj_change", central.DropChanges}, {"yj_set_root", central.DropRoots}, {"yj_record", central.DropRecords}, {"yj_batch", central.DropBatches},
	{"yj_record_archive", central.DropArchive}, {"yj_batch_archive", central.DropArchived}, {"yj_decision", central.DropDecisions}, {"yj_rebuild", central.DropRebuilds}, {"yj_duplicate", central.DropDuplicates}, {"yj_schema_change", central.DropHistory},
}

func tryStore(ctx context.Context, s *central.Store) error {
	const node, epoch, n = "db-check", "0123456789abcdef", 100
	b := audit.ProjectedBatch{Node: node, Epoch: epoch, Last: n - 1, MAC: strings.Repeat("cd", 32), KeyID: "db-check"}
	for i := range uint64(n) {
		b.Rows = append(b.Rows, audit.ProjectedRow{
			Node: node, Epoch: epoch, Sequence: i, LeafHash: strings.Repeat("ab", 32), Kind: "db.check", Signer: "𠮷野 ", Status: audit.StatusRecorded,
			SignedAt: 1, CreatedBy: node, ModifiedBy: node,
		})
	}
	for range 2 {
		if err := s.Apply(ctx, b); err != nil {
			return err
		}
	}
	forked := b
	forked.Rows = slices.Clone(b.Rows)
	forked.Rows[7].LeafHash = strings.Repeat("00", 32)
	if err := s.Apply(ctx, forked); !errors.Is(err, audit.ErrFork) {
		return fmt.Errorf("分叉 (a fork): %v", err)
	}
	if last, err := s.Shipped(ctx, node, epoch); err != nil || last != n-1 {
		return errors.Join(err, fmt.Errorf("最后一行 (the last row): %d", last))
	}
	if m, err := s.Archive(ctx, node, epoch, 0, 1<<62, n/2); err != nil || m.Rows != n/2 {
		return errors.Join(err, fmt.Errorf("归档的行 (rows moved to the archive): %d", m.Rows))
	}
	if err := s.Apply(ctx, b); err != nil { // changes nothing
		return err
	}
	var got []audit.ProjectedRow
	if err := s.Rows(ctx, node, epoch, 0, func(row audit.ProjectedRow) error { got = append(got, row); return nil }); err != nil {
		return err
	}
	if !slices.Equal(got, b.Rows) {
		return fmt.Errorf("读回的 %d 行不同 (the rows that came back differ)", len(got))
	}
	return nil
}
