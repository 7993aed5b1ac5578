package pkcs11

import (
	"crypto/rand"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	p11 "github.com/miekg/pkcs11"

	"yinjian/hsm"
	"yinjian/hsm/pkcs11/profiles"
)

// maxSigners is how many sessions sign at once at most.
const maxSigners = 64

// A burden is one operation whose speed is measured.
type burden struct {
	name      string
	mechanism Mechanism
	key       p11.ObjectHandle
	input     []byte
}

// underLoad opens as many sessions as there are, and measures how fast they sign.
func (p *prober) underLoad() {
	flags := uint(p11.CKF_SERIAL_SESSION)
	if p.chosen != nil && p.chosen.readWrite {
		flags |= p11.CKF_RW_SESSION
	}
	found := &ProbeSessions{Said: sessionLimit(p.ti), Opened: 1}
	p.report.Sessions = found
	sessions := []p11.SessionHandle{}
	for found.Opened < p.cfg.MaxSessions {
		var s p11.SessionHandle
		err := p.call("C_OpenSession", func() (err error) { s, err = p.lib.ctx.OpenSession(p.slot, flags); return err })
		if err != nil {
			found.Limit, found.Error = true, outcome(err)
			break
		}
		sessions = append(sessions, s)
		found.Opened++
	}
	if found.Said > 0 && found.Limit && uint(found.Opened) < found.Said {
		p.finding("令牌自报 %d 个会话，只打开了 %d 个 (the token says it has more sessions than could be opened)", found.Said, found.Opened)
	}
	p.progress()
	signers := slices.Insert(sessions, 0, p.session)
	for _, l := range p.loads() {
		p.report.Speed = append(p.report.Speed, p.measure(l, signers))
		p.progress()
	}
	for _, s := range signers[1:] {
		_ = p.call("C_CloseSession", func() error { return p.lib.ctx.CloseSession(s) })
	}
}

// loads are the operations that worked and whose speed matters.
func (p *prober) loads() (all []burden) {
	if p.chosen == nil {
		return nil
	}
	digest := make([]byte, 32)
	rand.Read(digest)
	for _, l := range []struct {
		name      string
		algorithm hsm.Algorithm
	}{{profiles.SM2SignE, hsm.SM2}, {profiles.RSAPKCS1, hsm.RSA2048}} {
		if !worked(p.chosen, "operations."+l.name) {
			continue
		}
		m := p.chosen.Operations[operations[l.name]]
		k := p.generate(p.chosen.Keys[l.algorithm]) // there already
		all = append(all, burden{l.name, m, k.private, m.input(digest)})
	}
	return all
}

// measure signs on 1, 2, 4 … sessions at once, until twice as many bring nothing any more.
func (p *prober) measure(l burden, sessions []p11.SessionHandle) ProbeSpeed {
	out := ProbeSpeed{Operation: l.name}
	best, idle := 0.0, 0
	for n := 1; n <= min(len(sessions), maxSigners) && idle < 2; n *= 2 {
		var signed atomic.Int64
		var failed atomic.Pointer[error]
		p.watch.Call("C_Sign", p.cfg.Measure)
		begin := time.Now() // interval
		var wg sync.WaitGroup
		for _, s := range sessions[:n] {
			wg.Go(func() {
				for first := true; first || time.Since(begin) < p.cfg.Measure; first = false {
					if _, err := p.lib.sign(s, l.mechanism, l.key, l.input); err != nil {
						failed.CompareAndSwap(nil, &err)
						return
					}
					signed.Add(1)
				}
			})
		}
		wg.Wait()
		took := time.Since(begin).Seconds()
		p.watch.Call("", 0)
		if err := failed.Load(); err != nil {
			out.Error = outcome(*err)
			p.finding("%d 个会话同时签名时出错 (an error while that many sessions sign): %v", n, *err)
			break
		}
		rate := float64(signed.Load()) / took
		out.Steps = append(out.Steps, ProbeStep{Sessions: n, PerSecond: rate})
		if rate > best*1.05 {
			idle = 0
		} else {
			idle++
		}
		best = max(best, rate)
	}
	for _, s := range out.Steps {
		if s.PerSecond >= 0.9*best {
			out.Knee = s.Sessions
			break
		}
	}
	return out
}

// bogus is a handle that no module gives out.
const bogus = 0x7FEDCBA9

// behaviour does what a caller should not do, and ends the login.
func (p *prober) behaviour() {
	saw := func(what string, err error, fine ...string) {
		a := outcome(err)
		p.report.Behaviour = append(p.report.Behaviour, ProbeBehaviour{What: what, Answer: a, Fine: slices.Contains(fine, a)})
		p.progress()
	}
	rules := p.viable()
	if len(rules) == 0 {
		rules = p.candidates
	}
	if p.report.Login == "accepted" {
		// The token has taken this PIN: a module that looks at it again finds it right.
		saw("double-login", p.call("C_Login", func() error { return p.lib.login(p.session, p.userType(rules[0]), p.cfg.PIN) }), "CKR_USER_ALREADY_LOGGED_IN")
	}
	if p.chosen == nil || !p.chosen.noSessionInfo {
		saw("wrong-session", p.call("C_GetSessionInfo", func() error { _, err := p.lib.ctx.GetSessionInfo(bogus); return err }), "CKR_SESSION_HANDLE_INVALID")
	}
	loads := p.loads()
	var kept *probeKey
	if len(loads) > 0 {
		_, err := p.sign(loads[0].mechanism, bogus, loads[0].input)
		saw("wrong-key", err, "CKR_KEY_HANDLE_INVALID", "CKR_OBJECT_HANDLE_INVALID")
		for _, k := range p.keys {
			if k.err == nil && k.private == loads[0].key && !k.onToken {
				kept = k
			}
		}
	}
	p.destroy(kept)
	if p.report.Login == "accepted" {
		saw("logout", p.call("C_Logout", func() error { return p.lib.ctx.Logout(p.session) }), "CKR_OK")
		if kept != nil {
			_, err := p.sign(loads[0].mechanism, kept.private, loads[0].input)
			saw("key-after-logout", err, "CKR_KEY_HANDLE_INVALID", "CKR_OBJECT_HANDLE_INVALID", "CKR_USER_NOT_LOGGED_IN", "CKR_KEY_TYPE_INCONSISTENT",
				"CKR_FUNCTION_FAILED")
			if err == nil {
				p.finding("退出登录后私钥仍可用 (a private key can be used after the logout)")
			}
		}
	}
	_ = p.call("C_CloseSession", func() error { return p.lib.ctx.CloseSession(p.session) })
}
