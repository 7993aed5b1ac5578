package main

import "testing"

// The bound has to grow by the drift at least; interrupted readings and a corrected kernel clock widen it, and are no fault.
func TestGrown(t *testing.T) {
	t.Parallel()
	samples := func(ppm, base float64, noise map[int]float64) (out []boundSample) {
		for i := range 10 {
			out = append(out, boundSample{float64(i), 1500 + base*float64(i) + noise[i], ppm})
		}
		return out
	}
	for name, c := range map[string]struct {
		of []boundSample
		ok bool
	}{
		"as it should":        {samples(50, 50, nil), true},
		"interrupted early":   {samples(50, 50, map[int]float64{0: 9000, 2: 700}), true},
		"interrupted late":    {samples(50, 50, map[int]float64{9: 9000, 7: 700}), true},
		"a corrected kernel":  {samples(50, 120, nil), true},
		"it does not grow":    {samples(50, 0, nil), false},
		"it shrinks":          {samples(50, -20, nil), false},
		"it grows far faster": {samples(50, 2000, nil), false},
		"hardly seen":         {samples(50, 50, nil)[:1], false},
	} {
		if us, s, err := grown(c.of); (err == nil) != c.ok {
			t.Errorf("%s: %.0f µs in %.0f s, %v", name, us, s, err)
		}
	}
}
