DROP TABLE yj_node
