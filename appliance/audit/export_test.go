package audit

// Waiting is the number of drafts in the queue.
func (j *Journal) Waiting() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.waiting)
}

var AppendOwn = appendOwn
