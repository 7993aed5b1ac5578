package central_test

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"yinjian/dbdriver/central"
)

// What every text of the registry and every migration keeps to, so that DM8, PostgreSQL and SQLite take it. That DM8's
// own parser accepts it is not shown by this.

// allowed are the words that may stand there in capitals. All ran on SQLite and PostgreSQL and are in DM8's grammar.
var allowed = strings.Fields(`
	SELECT DISTINCT FROM WHERE AND OR NOT NULL IS GROUP ORDER BY DESC LIMIT COUNT MAX
	INSERT INTO VALUES UPDATE SET DELETE UNION ALL
	CREATE ALTER ADD DROP TABLE UNIQUE INDEX ON PRIMARY KEY BIGINT SMALLINT VARCHAR`)

const (
	maxVarchar = 2000 // bytes
	maxRow     = 3500 // bytes: half an 8K page of DM8, less what it needs itself
	maxName    = 63   // PostgreSQL cuts longer ones
	maxValues  = 6056 // DM8's driver
	rows       = 64   // of the longest statement that inserts several
)

var (
	reToken = regexp.MustCompile(`^(?:\s+|[A-Za-z_][A-Za-z0-9_]*|[0-9]+|<=|>=|<>|[=<>(),*?]|\{\{bytes\}\})`)
	reWord  = regexp.MustCompile(`^[A-Za-z_]`)
)

func keywords(t *testing.T) []string {
	t.Helper()
	b, err := os.ReadFile("testdata/dm-keywords.txt")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			out = append(out, line)
		}
	}
	if len(out) != 645 {
		t.Fatalf("%d keywords, want 645", len(out))
	}
	return out
}

// lint answers what is wrong with a statement.
func lint(text string, keywords []string) (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	var tokens []string
	for rest := text; rest != ""; {
		tok := reToken.FindString(rest)
		if tok == "" {
			fault("%.20q is none of the constructs that are allowed", rest)
			return faults
		}
		rest = rest[len(tok):]
		if strings.TrimSpace(tok) != "" {
			tokens = append(tokens, tok)
		}
	}
	at := func(i int) string {
		if i < 0 || i >= len(tokens) {
			return ""
		}
		return tokens[i]
	}
	creates := strings.HasPrefix(text, "CREATE TABLE ")
	rowBytes, values, ordered := 0, 0, false
	for i, tok := range tokens {
		switch {
		case tok == "?":
			values++
		case tok == "{{bytes}}" && !creates:
			fault("{{bytes}} is a type")
		case tok == "*" && (at(i-2) != "COUNT" || at(i-1) != "("):
			fault("columns are listed by name")
		case tok == "VARCHAR":
			n, err := strconv.Atoi(at(i + 2))
			if at(i+1) != "(" || err != nil || n < 1 || n > maxVarchar {
				fault("VARCHAR needs a length of 1 to %d bytes", maxVarchar)
			}
			rowBytes += n
		case tok == "BIGINT" || tok == "SMALLINT":
			rowBytes += 8
		case tok == "ORDER":
			ordered = true
		case tok == "LIMIT" && (!ordered || at(i+1) != "?"):
			fault("LIMIT needs an order and a bound number")
		case tok == "INTO" && at(i+2) != "(":
			fault("INSERT lists its columns")
		}
		if !reWord.MatchString(tok) {
			continue
		}
		switch upper := strings.ToUpper(tok); {
		case tok == upper:
			if !slices.Contains(allowed, tok) {
				fault("%s is not among the words that are allowed", tok)
			}
		case tok != strings.ToLower(tok):
			fault("%s: names are lower-case", tok)
		case !strings.Contains(tok, "_") || strings.HasPrefix(tok, "_"):
			fault("%s: names have an underscore", tok)
		case len(tok) > maxName:
			fault("%s is too long", tok)
		case slices.Contains(keywords, upper):
			fault("%s is a word of DM's", tok)
		}
	}
	if rowBytes > maxRow {
		fault("a row of %d bytes", rowBytes)
	}
	if strings.HasPrefix(text, "INSERT ") {
		values *= rows
	}
	if values > maxValues {
		fault("%d values", values)
	}
	if creates {
		if !strings.Contains(text, "PRIMARY KEY (") {
			fault("no primary key")
		}
		for _, c := range []string{"created_by VARCHAR(64) NOT NULL", "created_at BIGINT NOT NULL", "modified_by VARCHAR(64) NOT NULL", "modified_at BIGINT NOT NULL"} {
			if !strings.Contains(text, c) {
				fault("the column %s is missing", c)
			}
		}
	}
	return faults
}

func TestStatements(t *testing.T) {
	t.Parallel()
	words := keywords(t)
	seen := map[string]bool{}
	texts := map[string]string{}
	for _, s := range central.Registry() {
		if seen[s.Name] || s.Name == "" {
			t.Errorf("%q: two statements have this name", s.Name)
		}
		seen[s.Name] = true
		texts[s.Name] = s.Text
	}
	files, err := central.Migrations()
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		texts[name] = text
	}
	if len(texts) < 19 {
		t.Errorf("only %d texts", len(texts))
	}
	for name, text := range texts {
		for _, f := range lint(text, words) {
			t.Errorf("%s: %s\n\t%s", name, f, text)
		}
	}
}

// Each rule finds what it is for.
func TestLintFinds(t *testing.T) {
	t.Parallel()
	words := keywords(t)
	const columns = `created_by VARCHAR(64) NOT NULL, created_at BIGINT NOT NULL, modified_by VARCHAR(64) NOT NULL, modified_at BIGINT NOT NULL`
	if f := lint(`CREATE TABLE yj_a (a_no BIGINT NOT NULL, a_data {{bytes}}, `+columns+`, PRIMARY KEY (a_no))`, words); len(f) > 0 {
		t.Fatal(f)
	}
	for text, want := range map[string]string{
		`SELECT a_no FROM yj_a WHERE b_text = ''`:                                  `"''"`,
		`SELECT "a_no" FROM yj_a`:                                                  `"\"a_no`,
		"SELECT `a_no` FROM yj_a":                                                  "`a_no",
		`SELECT a_no FROM yj_a;`:                                                   `";"`,
		`SELECT a_no FROM yj_a -- x`:                                               `"-- x"`,
		`SELECT a_no FROM yj_a WHERE a_no = :1`:                                    `":1"`,
		`SELECT a_no FROM yj_a WHERE a_no = $1`:                                    `"$1"`,
		`SELECT a_no FROM yj_a WHERE a_no = ? FOR UPDATE`:                          `FOR is not`,
		`SELECT a_no FROM yj_a ORDER BY a_no LIMIT ? OFFSET ?`:                     `OFFSET is not`,
		`SELECT a_no FROM yj_a LIMIT ?`:                                            `needs an order`,
		`SELECT a_no FROM yj_a ORDER BY a_no LIMIT 5`:                              `bound number`,
		`SELECT * FROM yj_a`:                                                       `by name`,
		`SELECT level FROM yj_a`:                                                   `level: names have an underscore`,
		`SELECT time_zone FROM yj_a`:                                               `word of DM's`,
		`SELECT a_No FROM yj_a`:                                                    `lower-case`,
		`SELECT a_no FROM ` + strings.Repeat("y_", 40):                             `too long`,
		`INSERT INTO yj_a VALUES (?)`:                                              `lists its columns`,
		`INSERT INTO yj_a (a_no) VALUES (?) ON CONFLICT DO NOTHING`:                `CONFLICT is not`,
		`INSERT INTO yj_a (a_no) VALUES (?) RETURNING a_no`:                        `RETURNING is not`,
		`INSERT INTO yj_a (a_no) VALUES (` + strings.Repeat("?, ", 100) + `?)`:     `6464 values`,
		`MERGE INTO yj_a (a_no)`:                                                   `MERGE is not`,
		`CREATE TABLE IF NOT EXISTS yj_a (a_no BIGINT)`:                            `IF is not`,
		`CREATE TABLE yj_a (a_no BIGINT NOT NULL, ` + columns + `)`:                `no primary key`,
		`CREATE TABLE yj_a (a_no BIGINT NOT NULL, PRIMARY KEY (a_no))`:             `created_by`,
		`CREATE TABLE yj_a (a_text TEXT)`:                                          `TEXT is not`,
		`CREATE TABLE yj_a (a_text VARCHAR)`:                                       `needs a length`,
		`CREATE TABLE yj_a (a_text VARCHAR(2001))`:                                 `needs a length`,
		`CREATE TABLE yj_a (a_text VARCHAR(2000), b_text VARCHAR(1600))`:           `a row of 3600`,
		`CREATE TABLE yj_a (a_no TIMESTAMP)`:                                       `TIMESTAMP is not`,
		`CREATE TABLE yj_a (a_no BIGINT IDENTITY(1, 1))`:                           `IDENTITY is not`,
		`UPDATE yj_a SET a_data = {{bytes}}`:                                       `is a type`,
		`SELECT a_no FROM yj_a WHERE a_no IN (SELECT a_no FROM yj_b) AND a_no = ?`: `IN is not`,
	} {
		if got := strings.Join(lint(text, words), "; "); !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
}
