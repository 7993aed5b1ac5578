package update

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"

	"yinjian/appliance/pack"
)

// Packs have an agent as images do, which speaks in the same way: the appliance may neither mount nor write outside its folder.
// It is a process of its own on a socket of its own, because what mounts for others must run outside of any sandbox with a mount
// namespace, and what writes the system's disk must not.

// A packQuestion is the first line; with "pack-stage" the pack follows.
type packQuestion struct {
	Do   string `json:"do"` // packs, pack-stage, pack-install, pack-remove, pack-key
	SM3  string `json:"sm3,omitempty"`
	Name string `json:"name,omitempty"`
	Key  string `json:"key,omitempty"` // PEM
}

type packReply struct {
	State   *pack.State     `json:"state,omitempty"`
	Pack    *pack.Installed `json:"pack,omitempty"`
	Key     string          `json:"key,omitempty"` // SM3, hex
	Refused *refusal        `json:"refused,omitempty"`
	Failed  string          `json:"failed,omitempty"`
}

// ServePacks answers questions about packs until ctx ends, which closes ln.
func ServePacks(ctx context.Context, ln net.Listener, k *pack.Keeper) error {
	up := make(uploads, agentUploads)
	return accept(ctx, ln, func(conn net.Conn) {
		r, err := answerPacks(ctx, bufio.NewReaderSize(patient{conn}, 64<<10), k, up)
		if err != nil {
			r = packReply{}
			r.Refused, r.Failed = told(err)
		}
		say(conn, r)
	})
}

func answerPacks(ctx context.Context, in *bufio.Reader, k *pack.Keeper, up uploads) (r packReply, err error) {
	line, err := readLine(in)
	if err != nil {
		return r, err
	}
	var q packQuestion
	if err := strict(line, &q); err != nil {
		return r, err
	}
	switch q.Do {
	case "packs":
		s := k.State()
		r.State = &s
	case "pack-stage":
		var done func()
		if done, err = up.take(); err == nil {
			defer done()
			r.Pack, err = k.Stage(ctx, in)
		}
	case "pack-install":
		r.Pack, err = k.Install(q.SM3)
	case "pack-remove":
		r.Pack, err = k.Remove(q.Name)
	case "pack-key":
		r.Key, err = k.Register(q.Key)
	default:
		err = fmt.Errorf("update: agent: nothing is called %q", q.Do)
	}
	return r, err
}

// A PackClient asks the agent of packs behind a socket. Safe for concurrent use. Refusals are *problem.Problem; [ErrNoAgent] where
// there is none.
type PackClient struct{ Socket string }

func (c *PackClient) ask(ctx context.Context, q packQuestion, body io.Reader) (packReply, error) {
	var r packReply
	sent, err := exchange(ctx, c.Socket, q, body, &r)
	if err == nil {
		err = unwrap(r.Refused, r.Failed)
	}
	if err == nil {
		err = sent
	}
	return r, err
}

// State answers what is installed and what is staged.
func (c *PackClient) State(ctx context.Context) (*pack.State, error) {
	r, err := c.ask(ctx, packQuestion{Do: "packs"}, nil)
	return r.State, err
}

// Stage sends a pack.
func (c *PackClient) Stage(ctx context.Context, file io.Reader) (*pack.Installed, error) {
	r, err := c.ask(ctx, packQuestion{Do: "pack-stage"}, file)
	return r.Pack, err
}

// Install installs what is staged and has that SM3.
func (c *PackClient) Install(ctx context.Context, sm3 string) (*pack.Installed, error) {
	r, err := c.ask(ctx, packQuestion{Do: "pack-install", SM3: sm3}, nil)
	return r.Pack, err
}

// Remove takes a pack away, by its name.
func (c *PackClient) Remove(ctx context.Context, name string) (*pack.Installed, error) {
	r, err := c.ask(ctx, packQuestion{Do: "pack-remove", Name: name}, nil)
	return r.Pack, err
}

// RegisterKey registers the hospital's key, PKIX in PEM, and answers its SM3.
func (c *PackClient) RegisterKey(ctx context.Context, key string) (string, error) {
	r, err := c.ask(ctx, packQuestion{Do: "pack-key", Key: key}, nil)
	return r.Key, err
}
