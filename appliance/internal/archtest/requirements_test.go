package archtest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const clauses = 117

// checkRequirements looks at the table of clauses: each number once and in order, a state, proofs that exist, and what is
// missing where something is; and the sums above it. exists says whether a test is there.
func checkRequirements(page string, exists func(folder, test string) bool) (faults []string) {
	next := 1
	sums, told := map[string]int{}, map[string]int{} // by level and state
	states := []string{holds, partly, "未做"}
	for line := range strings.Lines(page) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		if len(cells) == 6 && (cells[1] == "必须" || cells[1] == "应当" || cells[1] == "可选") {
			for i, s := range states {
				told[cells[1]+s], _ = strconv.Atoi(cells[2+i])
			}
		}
		if len(cells) < 7 {
			continue
		}
		n, err := strconv.Atoi(cells[1])
		if err != nil {
			continue
		}
		if n != next {
			faults = append(faults, fmt.Sprintf("clause %d stands where %d belongs", n, next))
		}
		next = n + 1
		state, proof := cells[4], strings.Join(cells[5:len(cells)-1], "|")
		sums[cells[2]+state]++
		named := reProof.FindAllStringSubmatch(proof, -1)
		for _, t := range named {
			if !exists(t[1], t[2]) {
				faults = append(faults, fmt.Sprintf("clause %d: there is no test %s", n, t[0]))
			}
		}
		words := strings.Trim(reProof.ReplaceAllString(proof, ""), " 、；")
		switch {
		case state == holds && len(named) == 0, state == partly && len(named) == 0:
			faults = append(faults, fmt.Sprintf("clause %d is proved by no test", n))
		case state == "未做" && len(named) > 0:
			faults = append(faults, fmt.Sprintf("clause %d is not done and has tests", n))
		case state != holds && len(words) < 6:
			faults = append(faults, fmt.Sprintf("clause %d: what is missing is not said", n))
		case state != holds && state != partly && state != "未做":
			faults = append(faults, fmt.Sprintf("clause %d: state %s", n, state))
		}
	}
	if next != clauses+1 {
		faults = append(faults, fmt.Sprintf("the table ends at %d", next-1))
	}
	for _, level := range []string{"必须", "应当", "可选"} {
		for _, s := range states {
			if sums[level+s] != told[level+s] {
				faults = append(faults, fmt.Sprintf("%s %s: the table has %d, the sum says %d", level, s, sums[level+s], told[level+s]))
			}
		}
	}
	return faults
}

// The page of requirements has every clause once, and names tests that exist.
func TestRequirements(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile(filepath.Join(root, "docs", "requirements.md"))
	if err != nil {
		t.Fatal(err)
	}
	page := string(b)
	exists := testsOfTree(t)
	for _, f := range checkRequirements(page, exists) {
		t.Error(f)
	}
	for name, tt := range map[string][2]string{
		"no such test":      {"appliance/pki.TestPKITS", "appliance/pki.TestPKITZ"},
		"a clause is gone":  {"\n| 4 |", "\n| x |"},
		"twice":             {"\n| 5 |", "\n| 4 |"},
		"unknown state":     {"| 成立 | `appliance/pki.TestPKITS`", "| 很好 | `appliance/pki.TestPKITS`"},
		"a wrong sum":       {"| 未做 | 没有移动端，也没有第三方扫码的对接 |", "| 部分 | `appliance/pki.TestPKITS`；没有移动端，也没有 |"},
		"holds by words":    {"`hsm/softtoken.TestSM3Vectors`、`hsm/softtoken.TestHMACSM3`", "算法库有"},
		"missing is unsaid": {"没有移动端，也没有第三方扫码的对接", "无"},
	} {
		spoilt := strings.Replace(page, tt[0], tt[1], 1)
		if spoilt == page || len(checkRequirements(spoilt, exists)) == 0 {
			t.Errorf("%s: no fault", name)
		}
	}
}
