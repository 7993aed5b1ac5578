package update_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"yinjian/appliance/problem"
	"yinjian/appliance/update"
)

// agent serves an updater on a socket, and tells of the floors that it was to keep.
func agent(t *testing.T, m *machine, trial ...func(bool) error) (*update.Client, *[]uint64) {
	t.Helper()
	u := m.updater()
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	kept := new([]uint64)
	trial = append(trial, func(bool) error { return nil })
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- update.Serve(ctx, ln, u, update.Hooks{
			Keep:  func(floor uint64) error { *kept = append(*kept, floor); return nil },
			Least: func(uint64) error { return nil },
			Want:  func(index, floor uint64) error { m.wanted[index] = floor; return nil }, Trial: trial[0], Restart: func() error { return nil },
		})
	}()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return &update.Client{Socket: socket}, kept
}

// What the appliance asks goes through the agent as it would without it, refusals with their words.
func TestAgent(t *testing.T) {
	t.Parallel()
	m := install(t, 1)
	c, kept := agent(t, m)
	ctx := t.Context()
	if s, err := c.Status(ctx); err != nil || s.Running != 1 || !s.Good {
		t.Fatalf("%+v, %v", s, err)
	}
	r := m.build(2)
	r.Manifest.Floor = 1
	whole := m.bundle(r)
	// Refused before it is read: the rest is not waited for, however long it is.
	_, err := c.Stage(ctx, io.MultiReader(bytes.NewReader(m.build(3).Bundle(t, nil)), bytes.NewReader(make([]byte, 200<<20))))
	wantCode(t, err, problem.Forbidden, "发布方")
	// Cut off in the middle: a caller that goes, and a bundle that ends.
	broken := errors.New("the upload broke")
	if _, err := c.Stage(ctx, io.MultiReader(bytes.NewReader(whole[:300_000]), failing{broken})); !errors.Is(err, broken) {
		t.Errorf("err = %v", err)
	}
	var o *update.Offer
	for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) { // interval; the agent may still be at the one before
		if o, err = c.Stage(ctx, bytes.NewReader(whole)); problem.CodeOf(err) != problem.WrongState || time.Since(begun) > 2*time.Minute { // interval
			break
		}
	}
	if err != nil || o.Index != 2 {
		t.Fatalf("%+v, %v", o, err)
	}
	_, err = c.Commit(ctx, "")
	wantCode(t, err, problem.WrongState, o.SM3)
	_, err = c.Restart(ctx)
	wantCode(t, err, problem.WrongState, "没有提交")
	if got, err := c.Commit(ctx, o.SM3); err != nil || got.SM3 != o.SM3 {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := c.Restart(ctx); err != nil || got.SM3 != o.SM3 {
		t.Errorf("%+v, %v", got, err)
	}
	c, kept = agent(t, m)
	if err := c.MarkGood(ctx); err != nil || len(*kept) != 1 || (*kept)[0] != 1 {
		t.Errorf("kept %v, %v", *kept, err)
	}
	if s, err := c.Status(ctx); err != nil || s.Running != 2 || !s.Good || s.Behind != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	_, err = c.Cancel(ctx, "")
	wantCode(t, err, problem.WrongState, "没有可取消")
	if _, err := (&update.Client{Socket: filepath.Join(t.TempDir(), "none")}).Status(ctx); !errors.Is(err, update.ErrNoAgent) {
		t.Errorf("err = %v", err)
	}
}

// The mark of a trial is taken away when the image is good, by another try if the first was cut off, and stays while an image waits
// to start.
func TestMarkOfATrial(t *testing.T) {
	t.Parallel()
	m := install(t, 1)
	var marks []bool // guarded by the agent, which answers one question at a time here
	var broken error
	trial := func(waits bool) error { marks = append(marks, waits); return broken }
	c, _ := agent(t, m, trial)
	want := func(what string, want ...bool) {
		t.Helper()
		if !slices.Equal(marks, want) {
			t.Errorf("%s: marks %v, want %v", what, marks, want)
		}
		marks = nil
	}
	ctx := t.Context()
	o, err := c.Stage(ctx, bytes.NewReader(m.bundle(m.build(2))))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Commit(ctx, ""); err == nil {
		t.Error("another bundle was committed")
	}
	want("a commit that was refused")
	if _, err := c.Commit(ctx, o.SM3); err != nil {
		t.Fatal(err)
	}
	want("a commit", true)
	if err := c.MarkGood(ctx); err != nil {
		t.Error(err)
	}
	want("the image before, while the next waits")
	c, _ = agent(t, m, trial)
	broken = errPower
	if err := c.MarkGood(ctx); err == nil {
		t.Error("the mark is said to be gone")
	}
	if s, err := c.Status(ctx); err != nil || !s.Good {
		t.Errorf("%+v, %v", s, err)
	}
	broken, marks = nil, nil
	if err := c.MarkGood(ctx); err != nil {
		t.Error(err)
	}
	want("a good image, again", false)
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// Nothing that a caller sends but a question moves the agent, and it goes on answering.
func TestAgentsCallers(t *testing.T) {
	t.Parallel()
	m := install(t, 1)
	c, _ := agent(t, m)
	for _, said := range []string{"", "\n", "{}\n", `{"do":"format"}` + "\n", `{"do":"status","more":1}` + "\n", `{"do":"status"} {}` + "\n", "{\"do\":\"sta", string(bytes.Repeat([]byte("x"), 1<<20))} {
		conn, err := net.Dial("unix", c.Socket)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write([]byte(said)) // it may hang up in the middle
		conn.(*net.UnixConn).CloseWrite()
		answer, _ := io.ReadAll(conn)
		conn.Close()
		if len(answer) > 0 && !bytes.HasPrefix(answer, []byte(`{"failed":`)) {
			t.Errorf("%.40q was answered %s", said, answer)
		}
	}
	for range 2 * update.AgentAtOnce { // who connects and says nothing
		conn, err := net.Dial("unix", c.Socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	ctx, stop := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer stop()
	if _, err := c.Status(ctx); err == nil {
		t.Error("more are answered at once than may be")
	}
}

// However many send slowly, and whatever, the agent answers questions.
func TestAgentsUploads(t *testing.T) {
	t.Parallel()
	m := install(t, 1)
	c, _ := agent(t, m)
	whole := m.bundle(m.build(2))
	slow := func(sent []byte) (*io.PipeWriter, chan error) {
		t.Helper()
		r, w := io.Pipe()
		ended := make(chan error, 1)
		go func() { _, err := c.Stage(t.Context(), r); ended <- err }()
		if _, err := w.Write(sent); err != nil {
			t.Fatal(err)
		}
		return w, ended
	}
	var refused []error
	type upload struct {
		w     *io.PipeWriter
		ended chan error
	}
	var waiting []upload
	for range 2 * update.AgentAtOnce { // the head of a bundle, and no more of it
		w, ended := slow(whole[:100])
		waiting = append(waiting, upload{w, ended})
	}
	ctx, stop := context.WithTimeout(t.Context(), 2*time.Minute)
	defer stop()
	if err := c.MarkGood(ctx); err != nil {
		t.Errorf("while others upload: %v", err)
	}
	for _, one := range waiting {
		one.w.Close()
		if err := <-one.ended; problem.CodeOf(err) == problem.WrongState {
			refused = append(refused, err)
		}
	}
	if len(refused) == 0 {
		t.Error("all are taken at once")
	}
}
