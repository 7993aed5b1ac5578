package softtoken_test

import (
	"sync"
	"sync/atomic"
	"testing"

	"github.com/emmansun/gmsm/sm3"
	"github.com/miekg/pkcs11"
)

// BenchmarkSM2Sign measures C_SignInit and C_Sign through the module and the socket, the daemon being a process of
// its own. signs/s is of all sessions together.
func BenchmarkSM2Sign(b *testing.B) {
	for name, sessions := range map[string]int{"1session": 1, "16sessions": 16} {
		b.Run(name, func(b *testing.B) {
			m := newFolder(b)
			m.startProcess(b)
			p := m.module(b)
			initToken(b, p, 0, "bench")
			s := openRW(b, p, 0)
			must(b, p.Login(s, pkcs11.CKU_USER, userPIN))
			_, priv := generateSM2(b, p, s, "k")
			e := sm3.Sum(nil)
			handles := make([]pkcs11.SessionHandle, sessions)
			for i := range handles {
				h, err := p.OpenSession(0, pkcs11.CKF_SERIAL_SESSION)
				must(b, err)
				handles[i] = h
			}
			var left atomic.Int64
			left.Store(int64(b.N))
			b.ResetTimer()
			var wg sync.WaitGroup
			for _, h := range handles {
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						if _, err := sign(p, h, mech(pkcs11.CKM_ECDSA, nil), priv, e[:]); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "signs/s")
		})
	}
}
