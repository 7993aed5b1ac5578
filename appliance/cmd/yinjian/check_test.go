package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/audit"
	"yinjian/appliance/uses"
	"yinjian/dbdriver/sqlite"
	"yinjian/ntp"
)

type checkKey struct{ *sm2.PrivateKey }

func (k checkKey) SignMessage(_ context.Context, m []byte) ([]byte, error) {
	return k.SignWithSM2(rand.Reader, nil, m)
}
func (k checkKey) Public() crypto.PublicKey { return &k.PublicKey }

type checkClock struct{}

func (checkClock) Now() ntp.Reading {
	return ntp.Reading{Time: time.Date(2026, 3, 1, 8, 0, 0, 0, time.UTC), State: ntp.Trusted, Provenance: "test"}
}

// What a crash leaves is no ✗; a signature past the appliance is one.
func TestUsesMarks(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ reason, mark, not string }{{uses.Ended, "  – 条目", "✗"}, {uses.Past, "  ✗ 条目", "–"}} {
		var out bytes.Buffer
		printUses(&out, &uses.Report{
			Keys: []uses.KeyCount{{}}, Named: []uses.NamedAt{{Named: uses.Named{Reason: c.reason}}}, Apart: []uses.ApartAt{{Difference: uses.Difference{Reason: c.reason}}},
		})
		if s := out.String(); strings.Count(s, c.mark) != 2 || strings.Contains(s, c.not) {
			t.Errorf("%s:\n%s", c.reason, s)
		}
	}
}

// A sentence is shown whole, a certificate is cut.
func TestPrintValue(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	sentence := strings.Repeat("密钥使用告警 ", 40) + "运行 yinjian audit verify"
	printValue(&out, "", []any{sentence, strings.Repeat("M", 400)})
	printValue(&out, "", map[string]any{"since_s": json.Number("16.931320475"), "pid": json.Number("17"), "unheard": true})
	for _, want := range []string{sentence, "共 400 字", "已持续（秒） since_s: 16.9\n", "进程号 pid: 17\n", "\nunheard: true\n"} {
		if s := out.String(); !strings.Contains(s, want) {
			t.Errorf("no %q in %s", want, s)
		}
	}
}

// What audit verify concludes, and its exit, for journals that are covered, not covered, put back, and without the key.
func TestAuditVerifyConclusions(t *testing.T) {
	t.Parallel()
	priv, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key := checkKey{priv}
	dir, old := filepath.Join(t.TempDir(), "journal"), filepath.Join(t.TempDir(), "old")
	grow := func(signer audit.CheckpointSigner) (last audit.Checkpoint) {
		t.Helper()
		store, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		log := logrus.New()
		log.SetOutput(io.Discard)
		j, err := audit.Open(t.Context(), audit.Config{Store: store, Node: "east", Clock: checkClock{}, Log: log, Checkpointer: signer})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- j.Run(ctx) }()
		if _, err := j.Append(t.Context(), audit.Draft{Kind: "sign.v1", Actor: "test"}); err != nil {
			t.Fatal(err)
		}
		cancel()
		if err := errors.Join(<-done); err != nil {
			t.Fatal(err)
		}
		if c, err := j.LastCheckpoint(); err == nil {
			last = c
		}
		if err := store.Close(); err != nil {
			t.Fatal(err)
		}
		return last
	}
	pub, err := smx509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	file := func(name string, data []byte) string {
		t.Helper()
		name = filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	logKey := file("log.pem", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pub}))
	check := func(what, journal, logKey string, want error, words string, known ...string) {
		t.Helper()
		var out bytes.Buffer
		err := auditVerify(t.Context(), &out, journal, logKey, "", nil, "text", known...)
		if !errors.Is(err, want) || !strings.Contains(out.String(), words) {
			t.Errorf("%s: %v, want %v and %q in\n%s", what, err, want, words, out.String())
		}
	}
	grow(key)
	if err := os.CopyFS(old, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	later := grow(key)
	note := file("note", later.Note)
	if err := os.WriteFile(note+".sig", later.Signature, 0o600); err != nil {
		t.Fatal(err)
	}
	check("covered", dir, logKey, nil, "结论 result: 未发现改动 (nothing was changed)", note)
	check("without the key", dir, "", errFound, "检查点签名未验，只能说")
	check("put back, not known", old, logKey, nil, "未发现改动")
	check("put back, known", old, logKey, errFound, string(audit.RolledBack), note)
	grow(nil)
	check("an entry without checkpoint", dir, logKey, errFound, "已覆盖部分未发现改动；其后 1 条无检查点覆盖", note)

	forged := bytes.Clone(later.Signature)
	forged[len(forged)-1] ^= 1
	if err := os.WriteFile(note+".sig", forged, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := auditVerify(t.Context(), io.Discard, dir, logKey, "", nil, "text", note); err == nil || errors.Is(err, errFound) {
		t.Errorf("a known checkpoint whose signature is wrong: %v", err)
	}
	var usage usageError
	if err := checkOutput("yaml"); !errors.As(err, &usage) {
		t.Errorf("-o yaml: %v", err)
	}
}
