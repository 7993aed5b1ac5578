package sign_test

import (
	"encoding/hex"
	"fmt"
	"sync/atomic"
	"testing"

	"yinjian/appliance/account"
)

func hexOf(b []byte) string { return hex.EncodeToString(b) }

// BenchmarkSign measures the whole procedure with keys in this process: what is left when the cipher machine costs
// nothing. The journal is on the temporary folder's disk, with its fsync; callers share it as they do in service.
func BenchmarkSign(b *testing.B) {
	for _, stamp := range []string{account.StampRequired, account.StampNone} {
		for _, alg := range []string{"SM2", "RSA-2048"} {
			for _, form := range []string{"raw", "cms"} {
				b.Run(fmt.Sprintf("stamp=%s/%s/%s", stamp, alg, form), func(b *testing.B) {
					w := newWard(b)
					app := w.App("bench", func(a *account.Application) { a.Stamp = stamp })
					var n atomic.Int64
					b.SetParallelism(32) // callers for each processor
					b.ReportAllocs()
					b.ResetTimer()
					b.RunParallel(func(pb *testing.PB) {
						for pb.Next() {
							if _, err := w.Signing.Sign(b.Context(), app, request(fmt.Sprint(n.Add(1)), alg, form)); err != nil {
								b.Error(err)
								return
							}
						}
					})
					b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "signatures/s")
				})
			}
		}
	}
}
