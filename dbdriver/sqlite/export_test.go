package sqlite

// SetFault calls f between the steps of making and rolling segments.
func SetFault(c *JournalConfig, f func(step string)) { c.fault = f }

// Settled are the numbers of the segments that are read without locks.
func Settled(j *Journal) (numbers []int) {
	for _, s := range j.segments {
		if s.settled != nil {
			numbers = append(numbers, s.number)
		}
	}
	return numbers
}
