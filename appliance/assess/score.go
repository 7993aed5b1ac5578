package assess

import "math"

// A Score is the self-assessment in points.
type Score struct {
	Layers     []LayerScore `json:"layers"`
	Technical  float64      `json:"technical"`  // of 70
	Management float64      `json:"management"` // of 30
	Total      float64      `json:"total"`      // of 100
	// Note says what it is not.
	Note string `json:"note"`
}

// A LayerScore is one layer's part.
type LayerScore struct {
	Layer  string  `json:"layer"`
	Weight float64 `json:"weight"`
	Mean   float64 `json:"mean"`   // of its indicators, 0 to 1
	Points float64 `json:"points"` // weight times mean
}

// weights are the layers' points.
var weights = []struct {
	layer     string
	points    float64
	technical bool
}{
	{Physical, 10, true}, {Network, 20, true}, {Device, 10, true}, {Application, 30, true},
	{Policy, 8, false}, {People, 8, false}, {Operation, 8, false}, {Emergency, 6, false},
}

// passMark is what an assessment asks for, together with no high risk.
const passMark = 60

const scoreNote = "自评分：按条目状态机械计算，Ra、Rk 取最低值，未取得证据的指标计 0 分，未作不适用裁剪；不是测评结论，不判断高风险。通过线 60 分且无高风险 " +
	"(a self-assessment, computed from the items' states with the least Ra and Rk; what is not evidenced counts 0 and nothing is called inapplicable. It is no assessor's verdict and judges no risks)"

// ScoreOf sums rows up: a layer's mean over its indicators, times its weight. Only what comes of it is rounded.
func ScoreOf(rows []Row) Score {
	s := Score{Layers: []LayerScore{}, Note: scoreNote}
	for _, w := range weights {
		l := LayerScore{Layer: w.layer, Weight: w.points}
		mean, n := 0.0, 0
		for _, r := range rows {
			if r.Layer == w.layer {
				mean += r.Score
				n++
			}
		}
		if n > 0 {
			mean /= float64(n)
		}
		points := mean * w.points
		l.Mean, l.Points = rounded(mean), rounded(points)
		s.Layers = append(s.Layers, l)
		if w.technical {
			s.Technical += points
		} else {
			s.Management += points
		}
	}
	s.Total = rounded(s.Technical + s.Management)
	s.Technical, s.Management = rounded(s.Technical), rounded(s.Management)
	return s
}

// rounded keeps four decimals, so that no two machines print another last digit.
func rounded(v float64) float64 { return math.Round(v*1e4) / 1e4 }

// Reached says whether the score would do, were it an assessor's.
func (s Score) Reached() bool { return s.Total >= passMark }
