package trial

import (
	"errors"
	"fmt"

	"github.com/Trisia/randomness"
	"github.com/Trisia/randomness/detect"
)

// A Set is how much is tested, and by which tests.
type Set string

const (
	Periodic Set = "periodic" // 20 groups of 20,000 bits, 12 tests
	PowerOn  Set = "power-on" // 20 groups of 1,000,000 bits, 15 tests
)

// Groups of bits that are tested one by one, and then together.
const Groups = 20

// Bytes is how many a set takes; 0 for no set.
func (s Set) Bytes() int { return Groups * s.group() }

func (s Set) group() int {
	switch s {
	case Periodic:
		return 20_000 / 8
	case PowerOn:
		return 1_000_000 / 8
	}
	return 0
}

// A Judged is what came of a set.
type Judged struct {
	Set    Set    `json:"set"`
	Passed bool   `json:"passed"`
	Tests  []Line `json:"tests"`
	Needed int    `json:"needed"` // groups that must pass each test
}

// A Line is one test over all groups.
type Line struct {
	Name   string `json:"name"`
	Groups int    `json:"groups_passed"`
	// Uniformity is how likely so uneven a spread of the groups' values is; below 0.0001 the test fails.
	Uniformity float64 `json:"uniformity"`
	Passed     bool    `json:"passed"`
}

// Test judges bytes of a random source: Alpha is 0.01 for a group, 0.0001 for their spread (GM/T 0005-2021). A perfect source
// fails the periodic set about once in six times (35 of 200, crypto/rand); GM/T 0062-2018 therefore has it tried once more before it is called bad, which is
// the caller's to do.
func Test(set Set, data []byte) (*Judged, error) {
	if set.Bytes() == 0 {
		return nil, fmt.Errorf("trial: no set of tests is called %.40q", set)
	}
	if len(data) != set.Bytes() {
		return nil, fmt.Errorf("trial: %d bytes, the set takes %d", len(data), set.Bytes())
	}
	round := detect.Round12
	if set == PowerOn {
		round = detect.Round15
	}
	out := &Judged{Set: set, Passed: true, Needed: detect.Threshold(Groups)}
	var spread [][]float64
	for g := range Groups {
		for i, r := range round(data[g*set.group() : (g+1)*set.group()]) {
			if g == 0 {
				out.Tests, spread = append(out.Tests, Line{Name: randomness.TestMethodArr[i].Name}), append(spread, nil)
			}
			spread[i] = append(spread[i], r.Q)
			if r.Pass {
				out.Tests[i].Groups++
			}
		}
	}
	if len(out.Tests) == 0 {
		return nil, errors.New("trial: the library ran no test")
	}
	for i := range out.Tests {
		l := &out.Tests[i]
		l.Uniformity = detect.ThresholdQ(spread[i])
		l.Passed = l.Groups >= out.Needed && l.Uniformity >= randomness.AlphaT
		out.Passed = out.Passed && l.Passed
	}
	return out, nil
}
