// Package preserve keeps the journal's evidence provable past the end of the timestamps in it: it stamps records in
// batches, stamps those stamps again before they end, and gives each record its part as an evidence record (RFC 4998).
//
// One token covers a batch: a hash tree whose leaves are the records' data groups, each the journal's entry with all its
// payloads. One token renews every batch: its tree's leaves are the newest tokens. Both are journal entries with the token
// as payload, so that whoever has the journal has all of it, and an archive timestamp exists only once its entry is durable.
// The leaves themselves are files that can be made again from the journal at any time.
//
// A run does what is due and can be cut off anywhere: an entry that is not there is made by the next one. The documents
// are not in the journal, and so in no tree.
package preserve

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/keylock"
	"yinjian/appliance/problem"
	"yinjian/ntp"
	"yinjian/tsa"
	"yinjian/tsa/ers"
)

// Kinds of journal entries. Each holds one archive timestamp.
const (
	KindArchived = "preserve.archived" // over a range of entries
	KindRenewed  = "preserve.renewed"  // over the newest tokens of before
)

// Fields and payloads of those entries.
const (
	fieldFirst     = "preserve.first"     // entries of the journal, [first, end)
	fieldEnd       = "preserve.end"       //
	fieldCount     = "preserve.count"     // leaves of the tree
	fieldChain     = "preserve.chain"     // which digest algorithm of the range it is, from 0
	fieldAlgorithm = "preserve.algorithm" // of the tree
	fieldRoot      = "preserve.root"
	fieldUntil     = "preserve.until" // when the token ends, microseconds since 1970

	payloadToken   = "token"   // ContentInfo, with the lists of the day
	payloadCovered = "covered" // of a renewal: its leaves, JSON
)

// A Journal holds the evidence and keeps the archive timestamps. *audit.Journal is one.
type Journal interface {
	Size() uint64
	Append(ctx context.Context, d audit.Draft) (audit.Receipt, error)
	Entry(ctx context.Context, sequence uint64) (audit.Record, error)
	Payload(ctx context.Context, e *audit.Entry, name string) ([]byte, error)
	Range(ctx context.Context, from uint64, fn func(audit.Record) error) error
}

// A Stamper is the timestamp unit that stamps the trees.
type Stamper interface {
	Issue(ctx context.Context, req *tsa.Request) (*tsa.Token, error)
	Chain() []*smx509.Certificate
}

// Config joins a service to the rest.
type Config struct {
	Journal Journal
	Clock   interface{ Now() ntp.Reading }
	Stamper Stamper
	// Validation are the certificates above all units and the newest lists of their issuers, DER: what stands beside each
	// token, so that the ones before it can be judged as they stood that day.
	Validation func() (certificates []*smx509.Certificate, lists [][]byte)
	// Reserve, if set, says whether there is room for another entry.
	Reserve func() error
	Dir     string // for leaves; may be emptied at any time

	Digest        ers.Algorithm          // of new trees; another one than before renews the trees
	Every         time.Duration          // a batch is closed that long after the one before
	Lead          time.Duration          // a token is renewed that long before its end
	AlgorithmEnds map[string]time.Time   // by name: SM2, SM3, RSA-2048, SHA-256 …
	Discarded     func(error, ...[]byte) // is given a token that could not be recorded
	Log           logrus.FieldLogger
}

// A Service archives and renews. Safe for concurrent use; one run goes on at a time.
type Service struct {
	cfg     Config
	running sync.Mutex // one run

	mu       sync.Mutex // guards what follows
	batches  []*batch   // by first; contiguous but for ranges without records
	tokens   map[uint64]*token
	scanned  uint64 // entries up to here are archived, or are none
	last     time.Time
	progress *Progress
	err      error

	leaves leafCache
	making keylock.Locks // by a leaf file's name: who makes it again
}

// A batch is a range of entries with its archive timestamps, one a digest algorithm.
type batch struct {
	first, end uint64
	chains     []*archived
}

// An archived is the first archive timestamp of a chain of a batch.
type archived struct {
	entry     uint64
	count     uint64
	algorithm ers.Algorithm
	root      []byte
}

// A token is what a later one may have to renew.
type token struct {
	entry     uint64
	algorithm ers.Algorithm // of the tree that it stamps, and of the tree that renews it
	until     time.Time
	renewedBy uint64 // entry; 0: by none
}

// A covered is one leaf of a renewal.
type covered struct {
	Entry  uint64 `json:"entry"`  // whose token it is
	Digest string `json:"digest"` // of the token, hex
}

// New makes a service that knows of nothing yet; see [Service.Replay].
func New(c Config) *Service {
	return &Service{cfg: c, tokens: map[uint64]*token{}}
}

// Replay takes an entry of the journal into account; those of other kinds are ignored. At a start all changes of state
// are replayed in order.
func (s *Service) Replay(ctx context.Context, e *audit.Entry) error {
	if e.Kind != KindArchived && e.Kind != KindRenewed {
		return nil
	}
	number := func(name string) uint64 { n, _ := e.Field(name).(audit.Int); return uint64(n) }
	root, _ := e.Field(fieldRoot).(audit.Octets)
	until, _ := e.Field(fieldUntil).(audit.Int)
	t := &token{entry: e.Sequence, algorithm: ers.Algorithm(e.Text(fieldAlgorithm)), until: time.UnixMicro(int64(until)).UTC()}
	var list []covered
	if e.Kind == KindRenewed {
		b, err := s.cfg.Journal.Payload(ctx, e, payloadCovered)
		if err == nil {
			err = json.Unmarshal(b, &list)
		}
		if err != nil {
			return fmt.Errorf("preserve: entry %d: %w", e.Sequence, err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tokens[e.Sequence] = t
	for _, c := range list {
		if old := s.tokens[c.Entry]; old != nil {
			old.renewedBy = e.Sequence
		}
	}
	if e.Kind == KindRenewed {
		return nil
	}
	a := &archived{entry: e.Sequence, count: number(fieldCount), algorithm: t.algorithm, root: root}
	first, end, chain := number(fieldFirst), number(fieldEnd), int(number(fieldChain))
	i, found := slices.BinarySearchFunc(s.batches, first, func(b *batch, first uint64) int { return cmp.Compare(b.first, first) })
	switch {
	case !found && chain == 0 && first < end:
		s.batches = slices.Insert(s.batches, i, &batch{first, end, []*archived{a}})
		s.scanned, s.last = max(s.scanned, end), e.Time.UTC()
	case found && chain == len(s.batches[i].chains) && end == s.batches[i].end:
		s.batches[i].chains = append(s.batches[i].chains, a)
	default:
		return fmt.Errorf("preserve: entry %d archives %d to %d, chain %d, which does not fit the ones before: %w", e.Sequence, first, end, chain, audit.ErrCorrupt)
	}
	return nil
}

// head is the newest token of a batch.
func (s *Service) head(b *batch) *token {
	t := s.tokens[b.chains[len(b.chains)-1].entry]
	for t.renewedBy != 0 {
		t = s.tokens[t.renewedBy]
	}
	return t
}

// heads are the newest tokens of all batches, by entry, each once.
func (s *Service) heads() []*token {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*token
	for _, b := range s.batches {
		out = append(out, s.head(b))
	}
	slices.SortFunc(out, func(a, b *token) int { return cmp.Compare(a.entry, b.entry) })
	return slices.Compact(out)
}

// ends is when a token under the chain, with a tree by a, does not count any more.
func (s *Service) ends(chain []*smx509.Certificate, a ers.Algorithm) time.Time {
	var end time.Time
	before := func(t time.Time) {
		if end.IsZero() || t.Before(end) {
			end = t
		}
	}
	for _, c := range chain {
		before(c.NotAfter.UTC())
	}
	for _, name := range append(evidence.AlgorithmsOf(chain...), string(a)) {
		if t, ok := s.cfg.AlgorithmEnds[name]; ok {
			before(t)
		}
	}
	return end
}

// An Outcome is what a run did.
type Outcome struct {
	Batches  int    `json:"batches"`  // archive timestamps over new records
	Records  uint64 `json:"records"`  // in them
	Renewed  int    `json:"renewed"`  // tokens that were stamped again
	Rehashed int    `json:"rehashed"` // batches under a new digest algorithm
}

// A Progress is how far a run is.
type Progress struct {
	Doing string `json:"doing"` // "archive", "renew", "rehash"
	Done  uint64 `json:"done"`
	Total uint64 `json:"total"`
}

func (s *Service) report(doing string, done, total uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.progress = &Progress{doing, done, total}
}

// Run does what is due, and archives all that is not archived yet if now is set. It is refused while time is not trusted,
// while another run goes on, and when a renewal would not last longer than what it renews.
func (s *Service) Run(ctx context.Context, actor string, now bool) (*Outcome, error) {
	if !s.running.TryLock() {
		return nil, problem.New(problem.NotReady, "存档正在进行 (a run is going on)", "用 yinjian preserve status 查看进度 (see its progress)")
	}
	defer s.running.Unlock()
	out, err := s.run(ctx, actor, now)
	s.mu.Lock()
	s.progress, s.err = nil, err
	s.mu.Unlock()
	return out, err
}

func (s *Service) run(ctx context.Context, actor string, now bool) (*Outcome, error) {
	out := new(Outcome)
	r := s.cfg.Clock.Now()
	if !r.Trusted() {
		return out, problem.New(problem.TimeUntrusted, "时间不可信，不盖存档时间戳 (time is not trusted: nothing is archived)", "恢复时间源后自动继续 (goes on by itself when time is trusted again)")
	}
	// 1. What ends soonest comes first. What keeps it from being renewed keeps nothing else.
	n, late := s.renew(ctx, actor, r.Time)
	out.Renewed = n
	// 2. New records.
	for now || s.batchDue(r.Time) {
		n, err := s.archive(ctx, actor)
		if err != nil {
			return out, errors.Join(late, err)
		}
		if n == 0 {
			break
		}
		out.Batches++
		out.Records += n
	}
	// 3. Trees of another algorithm than the configured one, after which the old ones need no renewal.
	for _, b := range s.toRehash() {
		if err := s.rehash(ctx, actor, b); err != nil {
			return out, errors.Join(late, err)
		}
		out.Rehashed++
	}
	if len(s.ending(r.Time)) == 0 {
		late = nil
	}
	return out, late
}

// batchDue reports whether there are entries to look at and the time since the batch before is over.
func (s *Service) batchDue(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.scanned < s.cfg.Journal.Size() && now.Sub(s.last) >= s.cfg.Every
}

// Due reports whether a run would do anything; idle until then costs nothing.
func (s *Service) Due(now time.Time) bool {
	return s.batchDue(now) || len(s.ending(now)) > 0 || len(s.toRehash()) > 0
}

// Since sets from when the first batch counts, for a journal that has none yet.
func (s *Service) Since(t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.last.IsZero() {
		s.last = t
	}
}

// ending are the newest tokens that end within the lead time.
func (s *Service) ending(now time.Time) []*token {
	return slices.DeleteFunc(s.heads(), func(t *token) bool { return t.until.Sub(now) > s.cfg.Lead })
}

func (s *Service) toRehash() []*batch {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*batch
	for _, b := range s.batches {
		if b.chains[len(b.chains)-1].algorithm != s.cfg.Digest {
			out = append(out, b)
		}
	}
	return out
}

// maxBatch bounds what one token covers, so that no run needs more than it may have.
const maxBatch = 1 << 20

// archive makes the next batch and answers how many records are in it; 0: there was none to archive.
func (s *Service) archive(ctx context.Context, actor string) (uint64, error) {
	s.mu.Lock()
	first := s.scanned
	s.mu.Unlock()
	size := s.cfg.Journal.Size()
	w, err := createLeaves(s.cfg.Dir, first, 0, s.cfg.Digest)
	if err != nil {
		return 0, err
	}
	defer w.abandon()
	end := first
	err = s.cfg.Journal.Range(ctx, first, func(r audit.Record) error {
		if r.Sequence >= size || w.count >= maxBatch {
			return errStop
		}
		end = r.Sequence + 1
		if end%progressEvery == 0 {
			s.report("archive", end-first, size-first)
		}
		if r.Entry.Kind != evidence.KindSign {
			return nil
		}
		leaf, err := s.leaf(ctx, &r, s.cfg.Digest, nil)
		if err != nil {
			return err
		}
		return w.add(r.Sequence, leaf)
	})
	if err != nil && !errors.Is(err, errStop) {
		return 0, fmt.Errorf("preserve: entries from %d: %w", first, err)
	}
	if w.count == 0 {
		s.mu.Lock()
		s.scanned, s.last = end, s.cfg.Clock.Now().Time // nothing to stamp is as good as a batch: it is looked again when the next is due
		s.mu.Unlock()
		return 0, nil
	}
	return w.count, s.seal(ctx, actor, w, first, end, 0, s.cfg.Digest)
}

// progressEvery is after how many entries a run says how far it is.
const progressEvery = 4096

var errStop = errors.New("preserve: enough")

// seal stamps a tree of records and journals it. The leaves' file is put in place first: what is made again from the
// journal does no harm without an entry.
func (s *Service) seal(ctx context.Context, actor string, w *leafWriter, first, end uint64, chain int, a ers.Algorithm) error {
	root, err := w.finish()
	if err != nil {
		return err
	}
	count := w.count
	ref := refOf(KindArchived, uint64(chain), first)
	return s.stamp(ctx, audit.Draft{
		Kind: KindArchived, Actor: actor, Object: fmt.Sprintf("%d-%d", first, end-1), Ref: ref,
		Fields: []audit.Field{
			{Name: fieldFirst, Value: audit.Int(first)}, {Name: fieldEnd, Value: audit.Int(end)},
			{Name: fieldCount, Value: audit.Int(count)}, {Name: fieldChain, Value: audit.Int(chain)},
		},
	}, a, root)
}

// refOf is an entry's ref: one archive timestamp is made once, also when the answer to its append was lost.
func refOf(kind string, numbers ...uint64) []byte {
	b := []byte("yinjian " + kind + "\n")
	for _, n := range numbers {
		b = binary.BigEndian.AppendUint64(b, n)
	}
	sum := sm3.Sum(b)
	return sum[:]
}

// stamp has a root stamped, adds what the token needs to be judged later, and journals it as the draft says. A token that
// could not be recorded is given account of.
func (s *Service) stamp(ctx context.Context, d audit.Draft, a ers.Algorithm, root []byte) error {
	if s.cfg.Reserve != nil {
		if err := s.cfg.Reserve(); err != nil {
			return err
		}
	}
	imprint, err := tsa.NewImprint(a.OID(), root)
	if err != nil {
		return fmt.Errorf("preserve: %w", err)
	}
	issued, err := s.cfg.Stamper.Issue(ctx, &tsa.Request{Imprint: imprint, CertReq: true})
	if errors.Is(err, tsa.ErrTimeNotAvailable) {
		return problem.New(problem.TimeUntrusted, "时间不可信，不盖存档时间戳 (time is not trusted: nothing is archived)", "恢复时间源后自动继续 (goes on by itself when time is trusted again)").With(err)
	}
	if err != nil {
		return fmt.Errorf("preserve: archive timestamp: %w", err)
	}
	receipt, err := s.record(ctx, d, a, root, imprint, issued)
	if err != nil {
		if s.cfg.Discarded != nil {
			s.cfg.Discarded(err, issued.DER)
		}
		var known *audit.DuplicateRefError
		if !errors.As(err, &known) {
			return fmt.Errorf("preserve: archive timestamp: %w", err)
		}
		// Its entry had been written though nobody was told. What it says is taken instead.
		if receipt, err = s.cfg.Journal.Entry(ctx, known.Sequence); err != nil {
			return fmt.Errorf("preserve: %w", err)
		}
	}
	return s.Replay(ctx, &receipt.Entry)
}

func (s *Service) record(ctx context.Context, d audit.Draft, a ers.Algorithm, root []byte, imprint tsa.Imprint, issued *tsa.Token) (audit.Receipt, error) {
	parsed, err := tsa.ParseToken(issued.DER)
	if err != nil {
		return audit.Receipt{}, err
	}
	if _, err := parsed.Verify(imprint); err != nil {
		return audit.Receipt{}, err
	}
	whole, err := parsed.Message().WithValidation(s.cfg.Validation())
	if err != nil {
		return audit.Receipt{}, err
	}
	until := s.ends(parsed.Certificates(), a)
	d.Unique, d.State = true, true
	d.Fields = append(d.Fields, audit.Field{Name: fieldAlgorithm, Value: audit.Text(a)}, audit.Field{Name: fieldRoot, Value: audit.Octets(root)},
		audit.Field{Name: fieldUntil, Value: audit.Int(until.UnixMicro())})
	d.Payloads = append(d.Payloads, audit.Attachment{Name: payloadToken, MediaType: "application/cms", Data: whole.Bytes()})
	return s.cfg.Journal.Append(ctx, d)
}

// renew stamps the newest tokens again if one of them ends soon, all of one digest algorithm with one token, and answers
// how many that were. A renewal that would end no later than what it renews is refused: the unit needs a new certificate.
func (s *Service) renew(ctx context.Context, actor string, now time.Time) (int, error) {
	renewed := 0
	done := map[ers.Algorithm]bool{}
	for {
		due := slices.DeleteFunc(s.ending(now), func(t *token) bool { return done[t.algorithm] })
		if len(due) == 0 {
			return renewed, nil
		}
		done[due[0].algorithm] = true
		a, latest := due[0].algorithm, due[0].until
		var leaves [][]byte
		var list []covered
		numbers := []uint64{}
		for _, t := range s.heads() {
			if t.algorithm != a {
				continue
			}
			der, err := s.tokenOf(ctx, t.entry)
			if err != nil {
				return renewed, err
			}
			leaf := a.Sum(der)
			leaves, list = append(leaves, leaf), append(list, covered{t.entry, hex.EncodeToString(leaf)})
			numbers = append(numbers, t.entry)
			s.report("renew", uint64(len(leaves)), uint64(len(s.heads())))
		}
		for _, t := range due {
			if t.algorithm == a && t.until.Before(latest) {
				latest = t.until
			}
		}
		if until := s.ends(s.cfg.Stamper.Chain(), a); !until.After(latest) || until.Sub(now) <= s.cfg.Lead {
			return renewed, problem.New(problem.CertificateUnusable,
				fmt.Sprintf("存档时间戳将于 %s 终止，而时间戳单元的证书或算法只到 %s，续盖无益 (the unit ends no later than what it should renew)", latest.Format(time.DateOnly), until.Format(time.DateOnly)),
				"先为时间戳单元换发证书（yinjian cert csr --for tsa:… --new-key），摘要算法到期的改 preserve.digest，再运行 yinjian preserve run (renew the unit's certificate first)")
		}
		b, err := json.Marshal(list)
		if err != nil {
			return renewed, err
		}
		err = s.stamp(ctx, audit.Draft{
			Kind: KindRenewed, Actor: actor, Object: fmt.Sprintf("%d tokens", len(list)), Ref: refOf(KindRenewed, numbers...),
			Fields:   []audit.Field{{Name: fieldCount, Value: audit.Int(len(list))}},
			Payloads: []audit.Attachment{{Name: payloadCovered, MediaType: "application/json", Data: b}},
		}, a, ers.NewTree(a, leaves).Root())
		if err != nil {
			return renewed, err
		}
		renewed += len(list)
	}
}

// rehash begins a new chain for a batch: every record's members and all that proved them before, by the configured digest
// (RFC 4998 §5.2, hash-tree renewal).
func (s *Service) rehash(ctx context.Context, actor string, b *batch) error {
	chain, count := len(b.chains), b.chains[0].count
	w, err := createLeaves(s.cfg.Dir, b.first, chain, s.cfg.Digest)
	if err != nil {
		return err
	}
	defer w.abandon()
	err = s.Records(ctx, b.first, b.end, func(r *audit.Record) error {
		before, err := s.recordOf(ctx, r, b, chain)
		if err != nil {
			return err
		}
		leaf, err := s.leaf(ctx, r, s.cfg.Digest, before)
		if err != nil {
			return err
		}
		if w.count%progressEvery == 0 {
			s.report("rehash", w.count, count)
		}
		return w.add(r.Sequence, leaf)
	})
	if err != nil {
		return fmt.Errorf("preserve: records from %d: %w", b.first, err)
	}
	return s.seal(ctx, actor, w, b.first, b.end, chain, s.cfg.Digest)
}

// Records calls fn with the signatures' entries in [first, end).
func (s *Service) Records(ctx context.Context, first, end uint64, fn func(*audit.Record) error) error {
	err := s.cfg.Journal.Range(ctx, first, func(r audit.Record) error {
		switch {
		case r.Sequence >= end:
			return errStop
		case r.Entry.Kind == evidence.KindSign:
			return fn(&r)
		}
		return nil
	})
	if errors.Is(err, errStop) {
		return nil
	}
	return err
}

// leaf is a record's data group. The entry has the SM3 of each payload, so that the first tree needs no payload.
func (s *Service) leaf(ctx context.Context, r *audit.Record, a ers.Algorithm, before *ers.Record) ([]byte, error) {
	if a == ers.SM3 && before == nil {
		hashes := [][]byte{a.Sum(r.EntryDER)}
		for _, p := range r.Entry.Payloads {
			hashes = append(hashes, p.SM3[:])
		}
		return ers.Group(a, ers.Set(hashes)), nil
	}
	members, err := s.members(ctx, r)
	if err != nil {
		return nil, err
	}
	if before == nil {
		before = new(ers.Record)
	}
	return ers.Group(a, before.MemberHashes(len(before.Chains), a, members...)), nil
}

// members are what [evidence.Bundle.Members] answers of the record's evidence.
func (s *Service) members(ctx context.Context, r *audit.Record) ([][]byte, error) {
	out := [][]byte{r.EntryDER}
	for _, p := range r.Entry.Payloads {
		data, err := s.cfg.Journal.Payload(ctx, &r.Entry, p.Name)
		if err != nil {
			return nil, err
		}
		out = append(out, data)
	}
	return out, nil
}

func (s *Service) tokenOf(ctx context.Context, entry uint64) ([]byte, error) {
	r, err := s.cfg.Journal.Entry(ctx, entry)
	if err != nil {
		return nil, fmt.Errorf("preserve: %w", err)
	}
	return s.cfg.Journal.Payload(ctx, &r.Entry, payloadToken)
}

// EvidenceRecord is the record's part of the archive, DER; nil while it is in no batch.
func (s *Service) EvidenceRecord(ctx context.Context, r *audit.Record) ([]byte, error) {
	s.mu.Lock()
	i, found := slices.BinarySearchFunc(s.batches, r.Sequence, func(b *batch, at uint64) int { return cmp.Compare(b.first, at) })
	if !found {
		i--
	}
	var b *batch
	chains := 0
	if i >= 0 && r.Sequence < s.batches[i].end && r.Entry.Kind == evidence.KindSign {
		b, chains = s.batches[i], len(s.batches[i].chains)
	}
	s.mu.Unlock()
	if b == nil {
		return nil, nil
	}
	record, err := s.recordOf(ctx, r, b, chains)
	if err != nil {
		return nil, err
	}
	return record.Bytes()
}

// recordOf puts a record's first chains together from the journal and the leaves.
func (s *Service) recordOf(ctx context.Context, r *audit.Record, b *batch, chains int) (*ers.Record, error) {
	members, err := s.members(ctx, r)
	if err != nil {
		return nil, err
	}
	out := new(ers.Record)
	for c := range chains {
		s.mu.Lock()
		a := b.chains[c]
		until := uint64(1<<63 - 1) // a renewal after the next chain has begun is for others
		if c+1 < len(b.chains) {
			until = b.chains[c+1].entry
		}
		s.mu.Unlock()
		path, err := s.path(ctx, b, c, r.Sequence)
		if err != nil {
			return nil, err
		}
		der, err := s.tokenOf(ctx, a.entry)
		if err != nil {
			return nil, err
		}
		t, err := ers.NewTimestamp(a.algorithm, ers.Reduce(out.MemberHashes(c, a.algorithm, members...), path), der)
		if err != nil {
			return nil, err
		}
		out = out.Rehashed(t)
		for entry := s.renewalOf(a.entry); entry != 0 && entry < until; entry = s.renewalOf(entry) {
			if t, err = s.renewal(ctx, entry, a.algorithm, t); err != nil {
				return nil, err
			}
			out = out.Renewed(t)
		}
	}
	return out, nil
}

func (s *Service) renewalOf(entry uint64) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tokens[entry].renewedBy
}

// renewal is the archive timestamp of a renewal's entry over one of the tokens that it covers.
func (s *Service) renewal(ctx context.Context, entry uint64, a ers.Algorithm, over *ers.Timestamp) (*ers.Timestamp, error) {
	r, err := s.cfg.Journal.Entry(ctx, entry)
	if err != nil {
		return nil, fmt.Errorf("preserve: %w", err)
	}
	b, err := s.cfg.Journal.Payload(ctx, &r.Entry, payloadCovered)
	if err != nil {
		return nil, err
	}
	der, err := s.cfg.Journal.Payload(ctx, &r.Entry, payloadToken)
	if err != nil {
		return nil, err
	}
	var list []covered
	if err := json.Unmarshal(b, &list); err != nil {
		return nil, fmt.Errorf("preserve: entry %d: %w", entry, err)
	}
	leaf := a.Sum(over.Token.DER)
	at := -1
	var leaves [][]byte
	for i, c := range list {
		h, err := hex.DecodeString(c.Digest)
		if err != nil {
			return nil, fmt.Errorf("preserve: entry %d: %w", entry, err)
		}
		if slices.Equal(h, leaf) {
			at = i
		}
		leaves = append(leaves, h)
	}
	if at < 0 {
		return nil, fmt.Errorf("preserve: entry %d renews another token: %w", entry, audit.ErrCorrupt)
	}
	return ers.NewTimestamp(a, ers.Reduce([][]byte{leaf}, ers.NewTree(a, leaves).Path(at)), der)
}

// A Status is what an administrator sees.
type Status struct {
	Records  uint64    `json:"records"`            // archived
	Batches  int       `json:"batches"`            //
	Waiting  uint64    `json:"waiting_entries"`    // entries of the journal since the last batch
	Tokens   int       `json:"newest_tokens"`      // that stand for all batches now
	Ends     string    `json:"earliest,omitempty"` // when the first of them ends, RFC 3339
	Due      []string  `json:"due"`                // what a run would do now: "archive", "renew", "rehash"
	Digest   string    `json:"digest"`
	Progress *Progress `json:"progress,omitempty"` // of the run that goes on
	Error    string    `json:"error,omitempty"`    // of the last run
}

// Status says how things stand.
func (s *Service) Status() *Status {
	now := s.cfg.Clock.Now().Time
	out := &Status{Due: []string{}, Digest: string(s.cfg.Digest)}
	heads := s.heads()
	var earliest time.Time
	for _, t := range heads {
		if earliest.IsZero() || t.until.Before(earliest) {
			earliest = t.until
		}
	}
	if out.Tokens = len(heads); out.Tokens > 0 {
		out.Ends = earliest.Format(time.RFC3339)
	}
	for name, due := range map[string]bool{"archive": s.batchDue(now), "renew": len(s.ending(now)) > 0, "rehash": len(s.toRehash()) > 0} {
		if due {
			out.Due = append(out.Due, name)
		}
	}
	slices.Sort(out.Due)
	s.mu.Lock()
	defer s.mu.Unlock()
	out.Batches, out.Waiting, out.Progress = len(s.batches), s.cfg.Journal.Size()-s.scanned, s.progress
	for _, b := range s.batches {
		out.Records += b.chains[0].count
	}
	if s.err != nil {
		out.Error = s.err.Error()
	}
	return out
}
