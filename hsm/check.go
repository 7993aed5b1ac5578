package hsm

import "context"

// A fresh signature is checked before it leaves the appliance. Who drives several machines can do better than refuse it:
// he can have another machine make it. So a [Key] hands its check down with the context, and [CheckAnswer] performs it.

type checkKey struct{}

// A check is what a Key wants of an answer.
type check struct {
	fits   func(answer []byte) error
	passed []byte // the answer that did
}

// CheckAnswer performs the check that ctx carries, and answers nil where it carries none. A signature that does not verify
// is [ErrBadSignature]. What passed here is not checked again by the Key that asked.
func CheckAnswer(ctx context.Context, answer []byte) error {
	c, ok := ctx.Value(checkKey{}).(*check)
	if !ok {
		return nil
	}
	if err := c.fits(answer); err != nil {
		return err
	}
	c.passed = answer
	return nil
}

// checked is do, and fits for its answer, made by whoever did first.
func (k *Key) checked(ctx context.Context, op Operation, digest []byte, fits func(answer []byte) error) ([]byte, error) {
	c := &check{fits: fits}
	answer, err := k.do(context.WithValue(ctx, checkKey{}, c), op, digest)
	if err != nil {
		return nil, err
	}
	if len(answer) > 0 && len(c.passed) == len(answer) && &c.passed[0] == &answer[0] {
		return answer, nil
	}
	return answer, fits(answer)
}
