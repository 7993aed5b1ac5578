package api_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"yinjian/appliance/account"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
)

var update = flag.Bool("update", false, "write golden files anew")

// codes reads all codes from their source.
func codes(t *testing.T) (all []problem.Code) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "../appliance/problem/problem.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(f, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || len(spec.Values) != 1 {
			return true
		}
		if id, ok := spec.Type.(*ast.Ident); ok && id.Name == "Code" {
			code, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, problem.Code(code))
		}
		return true
	})
	if len(all) < 20 {
		t.Fatalf("only %d codes found", len(all))
	}
	return all
}

func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; got:\n%s", path, got)
	}
}

// TestEveryCodeHasAFace answers each code of the vocabulary once; the bodies are golden.
func TestEveryCodeHasAFace(t *testing.T) {
	t.Parallel()
	sv := newServices()
	k := startWith(t, sv)
	instance := regexp.MustCompile(`urn:yinjian:request:[0-9a-f]{32}`)
	var out bytes.Buffer
	for _, code := range codes(t) {
		sv.sign = func(context.Context, *account.Application, *sign.Request) (*sign.Result, error) {
			p := problem.New(code, "原因 (reason)", "下一步 (next)").With(errors.New("SELECT secret FROM /var/lib"))
			p.TriesLeft = 3
			return nil, fmt.Errorf("signing: %w", p)
		}
		got := k.do(call{path: "/v1/sign", body: encode(t, signBody())})
		wantProblem(t, got, got.status, code, "")
		if got.status < 400 || got.status == 500 && code != problem.Internal {
			t.Errorf("%s has no face: %d", code, got.status)
		}
		if strings.Contains(string(got.body), "secret") {
			t.Errorf("%s shows its cause: %s", code, got.body)
		}
		fmt.Fprintf(&out, "%d %s\n", got.status, instance.ReplaceAll(got.body, []byte("urn:yinjian:request:ID")))
	}
	golden(t, "testdata/problems.golden", out.Bytes())
	k.stop()
	if !strings.Contains(k.log.String(), "SELECT secret") {
		t.Error("the cause was not logged")
	}
}

func TestOtherErrors(t *testing.T) {
	t.Parallel()
	sv := newServices()
	k := startWith(t, sv)
	for name, row := range map[string]struct {
		fail   func() error
		status int
		code   problem.Code
	}{
		"plain":        {func() error { return errors.New("sql: table secret") }, 500, problem.Internal},
		"deadline":     {func() error { return fmt.Errorf("secret: %w", context.DeadlineExceeded) }, 504, problem.Timeout},
		"cancelled":    {func() error { return context.Canceled }, 504, problem.Timeout},
		"unknown code": {func() error { return problem.New("secret_code", "secret", "secret") }, 500, problem.Internal},
		"panic":        {func() error { panic("secret") }, 500, problem.Internal},
		"runtime":      {func() error { var p *problem.Problem; return p.Unwrap() }, 500, problem.Internal},
	} {
		t.Run(name, func(t *testing.T) {
			sv.sign = func(context.Context, *account.Application, *sign.Request) (*sign.Result, error) {
				return nil, row.fail()
			}
			got := k.do(call{path: "/v1/sign", body: encode(t, signBody())})
			wantProblem(t, got, row.status, row.code, "")
			if strings.Contains(string(got.body), "secret") {
				t.Errorf("shown: %s", got.body)
			}
		})
	}
	k.stop()
	for _, logged := range []string{"sql: table secret", "panic: secret", "errors_test.go"} {
		if !strings.Contains(k.log.String(), logged) {
			t.Errorf("%q was not logged", logged)
		}
	}
	if strings.Contains(k.log.String(), hexOf(appKey)) {
		t.Error("a key was logged")
	}
}

func TestEvidenceNotFound(t *testing.T) {
	t.Parallel()
	sv := newServices()
	k := startWith(t, sv)
	sv.bundle = func(context.Context, *account.Application, string) ([]byte, error) {
		return nil, problem.New(problem.NotFound, "没有 (none)", "核对 (check)")
	}
	wantProblem(t, k.do(call{method: "GET", path: "/v1/evidence/" + record}), 404, problem.NotFound, "")
}
