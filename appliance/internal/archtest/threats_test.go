package archtest

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const (
	holds  = "成立"
	partly = "部分"
	open   = "未解决"
)

var (
	reProof = regexp.MustCompile("`([a-z0-9/-]+)\\.(Test[A-Za-z0-9_]+)`")
	reTest  = regexp.MustCompile(`(?m)^func (Test[A-Za-z0-9_]+)\(`)
)

// checkThreats compares the page of proofs with the attackers of the threat table; exists says whether a test is there.
func checkThreats(page, architecture string, exists func(folder, test string) bool) (faults []string) {
	_, table, _ := strings.Cut(architecture, "\n## Threats")
	table, _, _ = strings.Cut(table, "\n## ")
	var attackers, told []string
	for line := range strings.SplitSeq(table, "\n") {
		if cells := strings.Split(line, "|"); len(cells) == 5 {
			if name := strings.TrimSpace(cells[1]); name != "attacker" && strings.Trim(name, "-") != "" {
				attackers = append(attackers, name)
			}
		}
	}
	if len(attackers) < 6 {
		faults = append(faults, "ARCHITECTURE.md has no table of threats")
	}
	attacker := ""
	for line := range strings.SplitSeq(page, "\n") {
		if head, ok := strings.CutPrefix(line, "## "); ok {
			i := slices.IndexFunc(attackers, func(a string) bool { return strings.HasPrefix(head, a+" ") })
			if i < 0 {
				faults = append(faults, head+": no such attacker in ARCHITECTURE.md")
				continue
			}
			attacker = attackers[i]
			told = append(told, attacker)
		}
		cells := strings.Split(line, "|")
		if attacker == "" || len(cells) < 4 || strings.Trim(cells[1], " -") == "" || strings.HasPrefix(cells[1], " 不能做到") {
			continue
		}
		claim, state, proof := strings.TrimSpace(cells[1]), strings.TrimSpace(cells[2]), strings.Join(cells[3:], "|")
		named := reProof.FindAllStringSubmatch(proof, -1)
		for _, n := range named {
			if !exists(n[1], n[2]) {
				faults = append(faults, claim+": there is no test "+n[0])
			}
		}
		words := strings.TrimSpace(strings.Trim(reProof.ReplaceAllString(proof, ""), " |、"))
		switch state {
		case holds:
			if len(named) == 0 {
				faults = append(faults, claim+": holds by no test")
			}
		case partly, open:
			if len(words) < 12 {
				faults = append(faults, claim+": no reason is given")
			}
		default:
			faults = append(faults, claim+": state "+state)
		}
	}
	for _, a := range attackers {
		if !slices.Contains(told, a) {
			faults = append(faults, a+": nothing is said of this attacker")
		}
	}
	return faults
}

// The page of threats names tests that exist, and has every attacker of the picture.
func TestThreats(t *testing.T) {
	t.Parallel()
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(name)))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	page := read("docs/threats.md")
	for _, f := range checkThreats(page, read("ARCHITECTURE.md"), testsOfTree(t)) {
		t.Error(f)
	}
	if n := len(reProof.FindAllString(page, -1)); n < 20 {
		t.Errorf("%d tests are named", n)
	}
}

// Every test that a page names is there.
func TestNamedTests(t *testing.T) {
	t.Parallel()
	pages, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil || len(pages) < 30 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	pages = append(pages, filepath.Join(root, "ARCHITECTURE.md"), filepath.Join(root, "CHANGELOG.md"), filepath.Join(root, "bench", "PROFILE.md"))
	exists := testsOfTree(t)
	for _, page := range pages {
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range reProof.FindAllStringSubmatch(string(b), -1) {
			if !exists(m[1], m[2]) {
				t.Errorf("%s names %s, which is not there", filepath.Base(page), m[0])
			}
		}
	}
}

// testsOfTree says of a folder and a name whether that test is there.
func testsOfTree(t *testing.T) func(folder, test string) bool {
	tests := map[string][]string{} // by folder
	return func(folder, test string) bool {
		if tests[folder] == nil {
			tests[folder] = []string{""}
			files, err := filepath.Glob(filepath.Join(root, filepath.FromSlash(folder), "*_test.go"))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range files {
				b, err := os.ReadFile(f)
				if err != nil {
					t.Fatal(err)
				}
				for _, m := range reTest.FindAllStringSubmatch(string(b), -1) {
					tests[folder] = append(tests[folder], m[1])
				}
			}
		}
		return slices.Contains(tests[folder], test)
	}
}

func TestThreatsFindsFaults(t *testing.T) {
	t.Parallel()
	const (
		architecture = "\n## Threats\n\n| attacker | must not | state |\n| --- | --- | --- |\n| a thief | x | y |\n| b thief | x | y |\n" +
			"| c thief | x | y |\n| d thief | x | y |\n| e thief | x | y |\n| f thief | x | y |\n\n## Next\n| no | attacker | here |\n"
		page = "## a thief 贼\n\n| 不能做到 | 状态 | 证明 |\n| --- | --- | --- |\n| read | 成立 | `x/y.TestA` |\n| write | 部分 | only half of it: `x/y.TestA` |\n" +
			"| sign | 未解决 | nobody has built it |\n## b thief 贼\n## c thief 贼\n## d thief 贼\n## e thief 贼\n## f thief 贼\n"
	)
	exists := func(folder, test string) bool { return folder == "x/y" && test == "TestA" }
	if faults := checkThreats(page, architecture, exists); len(faults) != 0 {
		t.Errorf("the good page has %q", faults)
	}
	for name, tt := range map[string][2]string{
		"no such test":     {"`x/y.TestA` |\n| write", "`x/y.TestB` |\n| write"},
		"holds by words":   {"成立 | `x/y.TestA`", "成立 | believe us"},
		"partly, unsaid":   {"only half of it: ", ""},
		"open, unsaid":     {"nobody has built it", ""},
		"unknown state":    {"成立", "也许"},
		"attacker left":    {"## f thief 贼\n", ""},
		"unknown attacker": {"## f thief", "## g thief"},
	} {
		if faults := checkThreats(strings.Replace(page, tt[0], tt[1], 1), architecture, exists); len(faults) == 0 {
			t.Errorf("%s: no fault", name)
		}
	}
}
